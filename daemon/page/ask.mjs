// Asking the daemon: an answer in time, or in words why there is none.

const PATIENCE_MS = 10000;
const REFUSED = {
  421: "it does not answer to the name in the address",
  429: "as many look on as may",
  503: "as many connections are open as may be",
};

/** The JSON at a path, null of a HEAD. Throws an Error that says why there is none. */
export async function ask(path, method = "GET") {
  let status;
  try {
    const answer = await fetch(path, { method, signal: AbortSignal.timeout(PATIENCE_MS) });
    if (answer.ok) return method === "HEAD" ? null : await answer.json();
    ({ status } = answer);
  } catch (error) {
    if (error.name === "TimeoutError") throw new Error(`the daemon did not answer within ${PATIENCE_MS / 1000} s`);
    if (error instanceof TypeError) throw new Error("no connection to the daemon");
    throw error;
  }
  throw new Error(`the daemon refused: ${REFUSED[status] ?? `status ${status}`}`);
}
