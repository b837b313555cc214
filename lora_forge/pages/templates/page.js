"use strict";
(() => {
  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Charts: a figure element holds one figure as JSON for each view of it, drawn in the page's own colours.
  const themed = (json) => JSON.parse(json, (key, value) => (
    /color$/.test(key) && /^var\(--[\w-]+\)$/.test(value) ? colour(value.slice(4, -1)) : value
  ));
  const draw = (plot, json) => {
    const figure = themed(json);
    const ink = colour("--ink");
    const layout = {
      ...figure.layout, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
      font: { ...figure.layout.font, color: ink },
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: ink }, align: "left" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : figure.layout.dragmode, // a phone scrolls
    };
    Plotly.react(plot, figure.data, layout, { responsive: true, displayModeBar: false });
  };
  const charts = [...document.querySelectorAll(".chart")].map((chart) => {
    const views = [...chart.querySelectorAll("script")].map((one) => [one.dataset.label, one.textContent]);
    const plot = chart.querySelector(".plot");
    let shown = 0;
    const group = document.createElement("span");
    group.className = "views";
    chart.querySelector("figcaption").append(group);
    const buttons = views.length < 2 ? [] : views.map(([label], number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.addEventListener("click", () => { shown = number; show(); });
      group.append(button);
      return button;
    });
    const show = () => {
      buttons.forEach((button, number) => button.setAttribute("aria-pressed", String(number === shown)));
      draw(plot, views[shown][1]);
    };
    show();
    return show;
  });

  // Light and dark: as the system has it, until the button is pressed.
  const system = matchMedia("(prefers-color-scheme: dark)");
  document.querySelector(".theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
    root.dataset.theme = dark ? "light" : "dark";
    charts.forEach((show) => show());
  });
  system.addEventListener("change", () => charts.forEach((show) => show()));

  // Tables: sorted by a press on a column's name, filtered by words that all have to be there.
  const natural = (one, other) => {
    const [a, b] = [one, other].map((text) => text.split(/(\d+)/)); // text and numbers in turn
    for (let at = 0; at < Math.min(a.length, b.length); at += 1) {
      if (a[at] === b[at]) continue;
      return at % 2 ? Number(a[at]) - Number(b[at]) : a[at] < b[at] ? -1 : 1;
    }
    return a.length - b.length;
  };
  for (const table of document.querySelectorAll(".sortable")) {
    const body = table.querySelector("tbody");
    const rows = [...body.rows];
    const heads = [...table.querySelectorAll("th")];
    const texts = new Map(rows.map((row) => [row, [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase()]));
    const key = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const numbers = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numbers; // the largest numbers first
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((one, other) => {
        const [a, b] = [key(one, column), key(other, column)];
        if (a === "" || b === "") return (a === "") - (b === ""); // what is not known comes last either way
        const order = numbers ? Number(a) - Number(b) : natural(a, b);
        return down ? -order : order;
      });
      body.append(...rows);
    }));
    table.querySelector("input").addEventListener("input", (event) => {
      const wanted = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of rows) {
        row.hidden = !wanted.every((word) => texts.get(row).includes(word));
        left += !row.hidden;
      }
      table.querySelector("output").textContent = `${left} of ${rows.length}`;
    });
  }
})();
