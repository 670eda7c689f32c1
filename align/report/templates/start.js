// Data of the run to curves and samples.

const data = JSON.parse(document.getElementById("data").textContent);
if (data.stages.length) drawCharts(document.getElementById("charts"), data.stages, document.getElementById("smoothing"));
if (data.samples.rows.length) {
  const browser = document.getElementById("browser");
  browseSamples(browser, data.samples);
  tokenTips(browser);
}
