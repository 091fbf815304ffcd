#!/bin/sh
# Install Barcast on this machine, upgrade it, roll it back or remove it. Run as root, from a source tree:
#
#   deploy/install.sh install [NAME]   this tree becomes the current release; the one before stays. The instance
#                                      NAME gets a configuration and a password, if it has none
#   deploy/install.sh rollback         the release before becomes the current one, and the other way round
#   deploy/install.sh uninstall        programs and units go; configurations, passwords and state stay
#
# PYTHON    the interpreter, 3.11 or newer; default python3
# EXTRAS    extras to install as well, such as baselines for the model garch
# PREFIX    default /opt/barcast
# DESTDIR   another root, to try it: systemd is not told, and root is not needed
# pip's own variables hold, too: PIP_INDEX_URL, PIP_FIND_LINKS and so on.
set -eu
umask 022
PYTHON=${PYTHON:-python3} EXTRAS=${EXTRAS:-} PREFIX=${PREFIX:-/opt/barcast} DESTDIR=${DESTDIR:-}
home=$DESTDIR$PREFIX command=$DESTDIR/usr/local/bin/barcast etc=$DESTDIR/etc/barcast units=$DESTDIR/etc/systemd/system
here=$(cd "$(dirname "$0")/.." && pwd)

fail() { echo "install.sh: $*" >&2; exit 1; }

# Make $2 point to $1 at once: there is no moment without it.
point() { ln -sfn "$1" "$2.new" && mv -fT "$2.new" "$2"; }

reload() {
  if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
}

# Let release $1 say what it thinks of each configuration before it serves any.
verify() {
  "$home/$1/bin/barcast" --version >/dev/null || fail "$1 does not start; nothing was changed"
  for file in "$etc"/*.toml; do
    [ -e "$file" ] || continue
    # What is in the current release will be in this one. Beside the file, as paths are relative to it.
    trial=$etc/.${file##*/}.trial
    sed "s,$PREFIX/current/,$home/$1/,g" "$file" >"$trial"
    said=$("$home/$1/bin/barcast" check "$trial" 2>&1 >/dev/null) || {
      rm "$trial"
      echo "$said" | sed "s,$trial,$file,g" >&2
      fail "$1 cannot work with $file, as said above; nothing was changed"
    }
    rm "$trial"
  done
}

# Put the units of release $1 into place and make it the current one.
switch() {
  mkdir -p "$units"
  for unit in "$home/$1"/deploy/barcast*.service "$home/$1"/deploy/barcast*.socket "$home/$1"/deploy/barcast*.slice; do
    sed "s,/opt/barcast/,$PREFIX/,g" "$unit" >"$units/.${unit##*/}.new"
    mv "$units/.${unit##*/}.new" "$units/${unit##*/}"
  done
  before=$(readlink "$home/current" || true)
  if [ "$before" != "$1" ]; then
    [ -z "$before" ] || point "$before" "$home/previous"
    point "$1" "$home/current"
  fi
  mkdir -p "$DESTDIR/usr/local/bin"
  if [ -L "$command" ] || [ ! -e "$command" ]; then point "$PREFIX/current/bin/barcast" "$command"; fi
  reload
}

# Make a configuration and a password for instance $1, from the templates of release $2.
configure() {
  mkdir -p "$etc"
  if [ ! -e "$etc/$1.toml" ]; then
    sed -e "s,^instance = .*,instance = \"$1\"," \
      -e "s,^state_dir = .*,state_dir = \"/var/lib/barcast/$1\"," \
      -e 's,^# username = ,username = ,' \
      -e "s,^# password_file = .*,password_file = \"$1.password\"," \
      -e "s,^# socket = [^#]*#.*,socket = \"/run/barcast-retrain/$1\"  # trains in a service of its own," \
      "$home/$2/deploy/barcast.toml" >"$etc/$1.toml.new"
    mv "$etc/$1.toml.new" "$etc/$1.toml"
    echo "written: $etc/$1.toml"
  fi
  if [ ! -e "$etc/$1.password" ]; then
    (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$etc/$1.password")
    echo "written: $etc/$1.password"
  fi
}

# Copy to $1 what is installed, and nothing that lies about in the tree.
gather() {
  for part in pyproject.toml README.md LICENSE constraints.txt .dev/barcast models strategies daemon backtest deploy; do
    [ -e "$here/$part" ] || fail "$here is no source tree of Barcast: $part is missing"
    mkdir -p "$1/$(dirname "$part")"
    cp -RP "$here/$part" "$1/$part"
  done
  find "$1" -name __pycache__ -type d -prune -exec rm -rf {} +
}

install_release() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or newer is needed: name it, PYTHON=/usr/bin/python3.11"
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$PYTHON lacks the module venv: on Debian, apt-get install python3-venv"
  place=$("$PYTHON" -c 'import sys; print(sys.base_prefix)')
  case $place in
  /root/* | /home/*) [ -n "$DESTDIR" ] ||
    fail "$PYTHON lives in $place, where a service cannot reach it: name the system's, PYTHON=/usr/bin/python3" ;;
  esac
  tree=$(mktemp -d)
  trap 'rm -rf "$tree"' EXIT
  gather "$tree"
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$tree/pyproject.toml")
  content=$({
    (cd "$tree" && find . -type f | LC_ALL=C sort | xargs -d '\n' sha256sum)
    echo "$EXTRAS" && "$PYTHON" -VV && echo "$place"
  } | sha256sum | cut -c1-8)
  name=releases/$version-$content
  if [ ! -e "$home/$name/complete" ]; then
    echo "installing $home/$name"
    mkdir -p "$home/releases"
    rm -rf "${home:?}/$name"
    trap 'rm -rf "$tree" "$home/$name"' EXIT
    "$PYTHON" -m venv "$home/$name"
    "$home/$name/bin/python" -m pip install --quiet --disable-pip-version-check \
      -c "$tree/constraints.txt" "$tree${EXTRAS:+[$EXTRAS]}" || fail "pip failed, as said above; nothing was changed"
    cp -R "$tree/deploy" "$home/$name/deploy"
    verify "$name"
    touch "$home/$name/complete"
    trap 'rm -rf "$tree"' EXIT
  fi
  [ -z "${1:-}" ] || configure "$1" "$name"
  verify "$name"
  switch "$name"
  for old in "$home"/releases/*; do
    case releases/${old##*/} in
    "$(readlink "$home/current")" | "$(readlink "$home/previous" || true)") continue ;;
    esac
    # Some instance may not have been restarted for long.
    echo "${old##*/}/bin/python" | grep -qsFf - /proc/[0-9]*/cmdline || rm -rf "$old"
  done
  echo "current: $name"
  if [ -n "${1:-}" ]; then
    echo "next: edit $etc/$1.toml, then"
    echo "  $PREFIX/current/bin/barcast check $etc/$1.toml"
    echo "  systemctl enable --now barcast@$1"
  else
    echo "next: systemctl restart 'barcast@*.service'"
  fi
}

rollback() {
  name=$(readlink "$home/previous") || fail "there is no release before the current one"
  [ -e "$home/$name/complete" ] || fail "$home/$name is gone or incomplete"
  verify "$name"
  switch "$name"
  echo "current: $name"
  echo "next: systemctl restart 'barcast@*.service'"
}

uninstall() {
  enabled=$(ls -d "$units"/*.wants/barcast@*.service 2>/dev/null | sed 's,.*/,,' | tr '\n' ' ')
  if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
    systemctl stop 'barcast@*.service' 'barcast-retrain@*.socket' 'barcast-retrain@*.service'
  fi
  rm -f "$units"/barcast@.service "$units"/barcast-retrain@.service "$units"/barcast-retrain@.socket \
    "$units"/barcast-retrain.slice "$units"/*.wants/barcast@*.service
  [ "$(readlink "$command" || true)" != "$PREFIX/current/bin/barcast" ] || rm "$command"
  rm -rf "$home/releases" "$home/current" "$home/previous"
  rmdir "$home" 2>/dev/null || true
  reload
  [ -z "$enabled" ] || echo "no longer enabled: $enabled"
  echo "removed; configurations stay in $etc, state in $DESTDIR/var/lib/barcast"
}

if [ -z "$DESTDIR" ] && [ "$(id -u)" != 0 ]; then fail "run this as root"; fi
case ${1:-} in
rollback | uninstall) [ $# = 1 ] ||
  fail "$1 is of the program and all instances; for one, say systemctl disable --now barcast@$2, or barcast ctl CONFIG rollback" ;;
esac
case ${1:-} in
install)
  case ${2:-} in
  *[!a-z0-9-]* | -* | ?????????????????????*)
    fail "$2: an instance is called by a-z, 0-9 and -, 20 characters at most: a user is named after it" ;;
  esac
  install_release "${2:-}" ;;
rollback) rollback ;;
uninstall) uninstall ;;
*) fail "say install [NAME], rollback or uninstall" ;;
esac
