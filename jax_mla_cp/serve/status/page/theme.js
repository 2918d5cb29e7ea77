// Dark or light theme: follows the system until the button is pressed.

const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;

function apply() {
  root.dataset.theme = chosen ?? (system.matches ? "dark" : "light");
}

export function startTheme(button, redraw) {
  system.addEventListener("change", () => { apply(); redraw(); });
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    apply();
    redraw();
  });
  apply();
}
