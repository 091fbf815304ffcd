// Orders to the daemon. The token is asked for with the first one, and known to this tab until it is loaded again.

import { post } from "./ask.mjs";

const find = (id) => document.getElementById(id);
let token = "";

/**
 * Give an order; what came of it, or null where the person thought better of it. With a `title` and a `text` it
 * is asked for first. Throws an Error that says why it was not carried out.
 */
export async function order(verb, body, { title = "", text = "", action = "Order" } = {}) {
  if ((title || !token) && !(await agreed(title || "This needs the token", text, action))) return null;
  try {
    return (await post(`/orders/${verb}`, body, token)).done;
  } catch (error) {
    if (error.status === 401) token = "";
    throw error;
  }
}

/** Ask, and for the token where it is not known; whether the answer was yes. */
function agreed(title, text, action) {
  const dialog = find("order");
  find("order-title").textContent = title;
  find("order-text").textContent = text;
  find("order-do").textContent = action;
  find("order-token-label").hidden = Boolean(token);
  const field = find("order-token");
  [field.value, field.required] = ["", !token];
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const yes = dialog.returnValue === "yes";
      if (yes && !token) token = field.value.replace(/[^ -~]/g, "?").trim(); // other characters no header may have
      field.value = "";
      resolve(yes);
    }, { once: true });
  });
}

find("order-form").addEventListener("submit", (event) => {
  event.preventDefault(); // nothing is sent by the form itself
  find("order").close("yes");
});
find("order-cancel").addEventListener("click", () => find("order").close(""));
