// Asking the daemon: an answer in time, or in words why there is none.

const PATIENCE_MS = 10000;
const ORDER_MS = 120000; // a model is loaded and prepared before it serves
const REFUSED = {
  421: "it does not answer to the name in the address",
  429: "as many look on as may",
  503: "as many connections are open as may be",
};

/** The JSON at a path, null of a HEAD. Throws an Error that says why there is none. */
export async function ask(path, method = "GET", patience = PATIENCE_MS) {
  const answer = await heard(path, { method }, patience);
  if (answer.ok) return method === "HEAD" ? null : answer.json();
  throw new Error(`the daemon refused: ${REFUSED[answer.status] ?? `status ${answer.status}`}`);
}

/** What comes of an order. Throws an Error that says whether it was done, with the status of the answer. */
export async function post(path, body, token) {
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  let answer;
  try {
    answer = await heard(path, { method: "POST", headers, body: JSON.stringify(body) }, ORDER_MS);
  } catch (error) {
    throw new Error(`Not known whether it was done: ${error.message}; look before you order again.`);
  }
  if (answer.ok) return answer.json();
  const told = await answer.json().catch(() => ({}));
  const error = new Error(`Not done: ${told.error ?? REFUSED[answer.status] ?? `status ${answer.status}`}.`);
  error.status = answer.status;
  throw error;
}

async function heard(path, options, patience) {
  try {
    return await fetch(path, { ...options, signal: AbortSignal.timeout(patience) });
  } catch (error) {
    if (error.name === "TimeoutError") throw new Error(`the daemon did not answer within ${patience / 1000} s`);
    if (error instanceof TypeError) throw new Error("no connection to the daemon");
    throw error;
  }
}
