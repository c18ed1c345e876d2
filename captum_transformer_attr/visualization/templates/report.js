"use strict";
const opacity = document.getElementById("opacity");
if (opacity) {
  const shown = document.getElementById("opacity-value");
  const apply = () => {
    document.documentElement.style.setProperty("--overlay", opacity.value / 100);
    shown.textContent = opacity.value + " %";
  };
  opacity.addEventListener("input", apply);
  apply();
  document.getElementById("smooth").addEventListener("change", (event) => {
    document.body.classList.toggle("pixelated", !event.target.checked);
  });
}

for (const section of document.querySelectorAll("[data-example]")) {
  const show = () => {
    const chosen = section.querySelector(".classes input:checked").value;
    for (const element of section.querySelectorAll("[data-class]")) {
      element.hidden = element.dataset.class !== chosen;
    }
  };
  section.querySelector(".classes").addEventListener("change", show);
  show();  // A reloaded page keeps its chosen radio buttons.
}

const dialog = document.getElementById("enlarged");
const enlarge = (stack) => {
  const large = dialog.querySelector(".stack");
  large.style.cssText = stack.closest(".maps").style.cssText;
  large.replaceChildren(...Array.from(stack.children, (child) => child.cloneNode()));
  dialog.querySelector("p").textContent = stack.querySelector(".overlay").alt;
  dialog.showModal();
};
for (const stack of document.querySelectorAll(".stack[role=button]")) {
  stack.addEventListener("click", () => enlarge(stack));
  stack.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); enlarge(stack); }
  });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
