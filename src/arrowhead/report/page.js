"use strict";
{
  const gallery = document.getElementById("gallery");
  const split = document.getElementById("split");
  const plans = [...document.querySelectorAll("input[name=plan]")];
  const order = document.getElementById("order");
  const figures = [...gallery.children]; // as made

  // the slider: one for all pictures, drawn on each of them
  const divide = (percent) => {
    split.value = percent;
    split.setAttribute("aria-valuetext", `${split.value} % raw`);
    gallery.style.setProperty("--split", `${split.value}%`);
  };
  split.addEventListener("input", () => divide(split.value));
  let held = null; // the picture that is dragged on
  const drag = (event) => {
    if (!held) return;
    const box = held.getBoundingClientRect();
    divide((100 * (event.clientX - box.left)) / box.width);
  };
  gallery.addEventListener("pointerdown", (event) => {
    held = event.target.closest(".pair");
    drag(event);
  });
  addEventListener("pointermove", drag);
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => (held = null));

  const chosen = () => plans.find((plan) => plan.checked);
  const arrange = () => {
    const change = (figure) => Number(figure.querySelector(`span[data-plan="${chosen().value}"]`).dataset.psnr);
    gallery.append(...(order.value === "made" ? figures : figures.toSorted((a, b) => change(a) - change(b))));
  };
  const choose = () => {
    for (const own of gallery.querySelectorAll("[data-plan]")) own.hidden = own.dataset.plan !== chosen().value;
    document.getElementById("chosen").value = chosen().dataset.name;
    arrange();
  };
  for (const plan of plans) plan.addEventListener("change", choose);
  order.addEventListener("change", arrange);

  const size = document.getElementById("size");
  const resize = () => gallery.style.setProperty("--size", `${size.value}px`);
  size.addEventListener("input", resize);
  const difference = document.getElementById("difference");
  difference.addEventListener("change", () => {
    gallery.classList.toggle("difference", difference.checked);
    split.disabled = difference.checked;
  });

  divide(50);
  resize();

  // the maps: what a cell does is the title of the area that it lies in
  for (const map of document.querySelectorAll(".map")) {
    const cells = map.querySelector(".cells");
    const areas = [...cells.querySelectorAll("[data-name]")];
    const rows = [...map.querySelectorAll("[data-row]")].map((row) => row.dataset.row);
    const cursor = map.querySelector(".cursor");
    const frame = map.querySelector(".wide");
    let [step, row] = [0, 0];
    const point = (x, y) => {
      const area = areas.find((own) => own.isPointInFill(new DOMPoint(x + 0.5, y + 0.5)));
      if (!area) return;
      [step, row] = [x, y];
      map.querySelector("output").value = `${rows[row]}, step ${step}: ${area.querySelector("title").textContent}`;
      cursor.setAttribute("transform", `translate(${x} ${y})`);
      cursor.setAttribute("visibility", "visible");
    };
    const under = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(cells.getScreenCTM().inverse());
      point(Math.floor(at.x), Math.floor(at.y));
    };
    cells.addEventListener("pointermove", under);
    cells.addEventListener("pointerdown", under);
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    frame.addEventListener("keydown", (event) => {
      if (!(event.key in ways)) return;
      event.preventDefault();
      const [right, down] = ways[event.key];
      point(step + right, row + down);
      cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    frame.addEventListener("focus", () => frame.matches(":focus-visible") && point(step, row));
  }
}
