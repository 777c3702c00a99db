const peek = document.getElementById("peek"), picture = peek.querySelector("i"), text = peek.querySelector("span");

function show(event) {
  const dot = event.target.closest(".map circle");
  if (!dot) { peek.hidden = true; return; }
  const number = Number(dot.dataset.i), [image, label, predicted] = points[number];
  text.textContent = `${label}${label === predicted ? "" : `, kNN: ${predicted}`} (test image ${image})`;
  if (sprite) {
    const column = number % sprite.columns, row = Math.floor(number / sprite.columns);
    picture.style.backgroundSize = `${100 * sprite.columns}% ${100 * sprite.rows}%`;
    picture.style.backgroundPosition =
      `${100 * column / Math.max(1, sprite.columns - 1)}% ${100 * row / Math.max(1, sprite.rows - 1)}%`;
  }
  peek.hidden = false;
  const box = dot.getBoundingClientRect();
  peek.style.left = `${Math.max(8, Math.min(box.left + 14, innerWidth - peek.offsetWidth - 8))}px`;
  peek.style.top = `${Math.max(8, Math.min(box.top + 14, innerHeight - peek.offsetHeight - 8))}px`;
}

addEventListener("pointerover", show);
addEventListener("pointerdown", show);
addEventListener("scroll", () => { peek.hidden = true; }, { passive: true });

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const chosen = button.getAttribute("aria-pressed") === "false" ? button.dataset.class : null;
    for (const other of document.querySelectorAll(".legend button"))
      other.setAttribute("aria-pressed", String(other.dataset.class === chosen));
    for (const dot of document.querySelectorAll(".map circle"))
      dot.classList.toggle("dim", chosen !== null && !dot.classList.contains(chosen));
  });
}
