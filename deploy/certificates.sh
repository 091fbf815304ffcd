#!/bin/sh
# Make what TLS between a broker and its clients needs: certificates.sh DIRECTORY HOST...
#
#   ca.pem, ca.key            an authority of your own, for ten years. Kept when it is there; keep ca.key to yourself
#   server.pem, server.key    the broker's, for two years and the names or addresses given, made anew each time
#
# Clients get ca.pem: `ca_file` in [mqtt].
set -eu
[ $# -ge 2 ] || { echo "certificates.sh: say DIRECTORY HOST..., such as /etc/mosquitto/certs broker.example" >&2; exit 1; }
mkdir -p "$1" && cd "$1"
shift
umask 077
names=
for host in "$@"; do
  case $host in
  *:*) kind=IP ;;
  *[!0-9.]*) kind=DNS ;;
  *) kind=IP ;;
  esac
  names=$names${names:+,}$kind:$host
done
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

if [ ! -e ca.pem ]; then
  key ca.key
  openssl req -new -x509 -key ca.key -sha256 -days 3650 -subj "/CN=Authority of $1" -out ca.pem \
    -addext keyUsage=critical,keyCertSign,cRLSign
fi
key server.key
openssl req -new -key server.key -subj "/CN=$1" -out server.csr
cat >server.ext <<EOF
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = $names
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
EOF
openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" -sha256 \
  -days 730 -extfile server.ext -out server.pem 2>/dev/null
rm server.csr server.ext
chmod 644 ca.pem server.pem
# Started by root, mosquitto reads its files as a user of its own.
if [ "$(id -u)" = 0 ] && getent group mosquitto >/dev/null; then
  chgrp mosquitto server.key && chmod 640 server.key
fi
echo "broker: $names, until $(openssl x509 -in server.pem -noout -enddate | cut -d= -f2)"
