const body = document.body;
document.querySelectorAll("button[data-mode]").forEach((button, _, all) =>
  button.addEventListener("click", () => {
    body.dataset.view = button.dataset.mode;
    body.dataset.blink = "exact";
    all.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
  }));
document.querySelectorAll("input.split").forEach((input) =>
  input.addEventListener("input", () => input.previousElementSibling.style.setProperty("--split", `${input.value}%`)));

// On the picture the border follows the pointer; a finger that scrolls the page moves nothing.
document.querySelectorAll(".stage").forEach((stage) =>
  stage.addEventListener("pointermove", (event) => {
    if (body.dataset.view !== "slider" || event.pointerType === "touch") return;
    const box = stage.getBoundingClientRect();
    const input = stage.nextElementSibling;
    input.value = (100 * (event.clientX - box.left)) / box.width;
    stage.style.setProperty("--split", `${input.value}%`);
  }));
document.getElementById("size").addEventListener("input", (event) =>
  body.style.setProperty("--size", `${event.target.value}px`));
setInterval(() => {
  if (body.dataset.view === "blink") body.dataset.blink = body.dataset.blink === "other" ? "exact" : "other";
}, 600);
