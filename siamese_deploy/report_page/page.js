"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const slider = document.getElementById("slider");
  if (!slider) return;
  const data = read("slider-data");
  const metrics = read("metrics");
  const nSame = metrics.same_pairs;
  const nDifferent = metrics.pairs - metrics.same_pairs;

  // The rules of format.py.
  const share = (value) => {
    const p = 100 * value;
    const rest = Math.min(p, 100 - p);
    const digits = rest === 0 ? 0 : rest >= 1 ? 1 : rest >= 0.1 ? 2 : rest >= 0.01 ? 3 : 4;
    return p.toFixed(digits) + "\u00a0%";
  };
  const score = (value) => value.toFixed(6).replace(/\.?0+$/, "");
  const count = (value) => value.toLocaleString("en-US");
  const plain = (value) => value.toFixed(3);
  const ratio = (a, b) => (b === 0 ? null : a / b);

  const decisions = (position) => {
    if (position === data.start) return metrics.at_threshold;
    const trueAccepts = data.same[position];
    const falseAccepts = data.different[position];
    const falseRejects = nSame - trueAccepts;
    const trueRejects = nDifferent - falseAccepts;
    const accepts = trueAccepts + falseAccepts;
    const rejects = trueRejects + falseRejects;
    return {
      true_accepts: trueAccepts,
      false_accepts: falseAccepts,
      true_rejects: trueRejects,
      false_rejects: falseRejects,
      accuracy: ratio(trueAccepts + trueRejects, accepts + rejects),
      precision: ratio(trueAccepts, accepts),
      recall: ratio(trueAccepts, nSame),
      far: ratio(falseAccepts, nDifferent),
      f1: ratio(2 * trueAccepts, 2 * trueAccepts + falseAccepts + falseRejects),
      mcc: ratio(
        trueAccepts * trueRejects - falseAccepts * falseRejects,
        Math.sqrt(accepts) * Math.sqrt(rejects) * Math.sqrt(nSame) * Math.sqrt(nDifferent)
      ),
    };
  };
  const shown = {
    accuracy: share, precision: share, recall: share, far: share, f1: plain, mcc: plain,
    true_accepts: count, false_accepts: count, true_rejects: count, false_rejects: count,
  };

  const output = document.getElementById("slider-value");
  const presets = [...document.querySelectorAll("button[data-position]")];
  const show = () => {
    const position = Number(slider.value);
    const at = decisions(position);
    for (const [key, format] of Object.entries(shown)) {
      for (const element of document.querySelectorAll(`[data-live="${key}"]`)) {
        element.textContent = at[key] === null ? "\u2013" : format(at[key]);
        element.value = at[key] === null ? "" : String(at[key]);
      }
    }
    output.textContent = score(data.thresholds[position]);
    slider.setAttribute(
      "aria-valuetext",
      `threshold ${output.textContent}, accepts ${shown.recall(at.recall || 0)} of same and ${shown.far(at.far || 0)} of different pairs`
    );
    for (const [name, [x, y]] of Object.entries(data.marks)) {
      const mark = document.getElementById(`mark-${name}`);
      mark.setAttribute("transform", `translate(${x[position]} ${name === "histogram" ? 0 : y[position]})`);
    }
    for (const button of presets) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.position) === position));
    }
  };
  slider.addEventListener("input", show);
  for (const button of presets) {
    button.addEventListener("click", () => {
      slider.value = button.dataset.position;
      show();
    });
  }
  slider.value = data.start; // a browser may have kept where it stood before the page was loaded again
  document.getElementById("slider-box").hidden = false;
  show();
})();
