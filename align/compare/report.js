"use strict";
// Shows the examples that fit the search and the choice; without it, the page shows all of them.
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const [search, outcome, different] = ["search", "outcome", "different"].map((name) => form.elements[name]);
  const shown = document.getElementById("shown");
  const examples = [...document.querySelectorAll(".example")].map((node) => ({
    node,
    text: node.textContent.toLowerCase(),
    outcomes: new Set((node.dataset.outcomes || "").split(" ")),
    same: "same" in node.dataset,
  }));
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { node, text, outcomes, same } of examples) {
      const fits = words.every((word) => text.includes(word)) && (!outcome.value || outcomes.has(outcome.value))
        && !(different.checked && same);
      node.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${examples.length} prompts`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const { node } of examples) if (!node.open) { opened.push(node); node.open = true; }
  });
  addEventListener("afterprint", () => { for (const node of opened.splice(0)) node.open = false; });
  apply();
})();
