// Starts the deck, then makes the text of each slide as large as fits: fonts differ from machine to machine.
const LARGEST = 26, SMALLEST = 17, PICTURE = 230;

function tooFull(section) {
  const edge = section.getBoundingClientRect();
  const scale = edge.width / section.offsetWidth;
  const inner = [...section.children].filter(part => !part.matches("aside"));
  const over = inner.some(part => part.getBoundingClientRect().bottom > edge.bottom - 40 * scale
    || part.scrollWidth > part.clientWidth + 1);
  const pictures = [...section.querySelectorAll(".figures, .view")];
  return over || pictures.some(part => part.offsetHeight < PICTURE);
}

function fit(section) {
  for (let size = LARGEST; size >= SMALLEST; size -= 1) {
    section.style.fontSize = size + "px";
    if (!tooFull(section)) return;
  }
}

async function start() {
  await Reveal.initialize({
    width: 1280, height: 720, margin: 0, center: false, hash: true, slideNumber: "c/t", transition: "none",
    display: "flex", viewDistance: 100, mobileViewDistance: 100, plugins: [RevealNotes],
  });
  await MathJax.startup.promise;
  await Promise.all([...document.images].map(image => image.decode().catch(() => {})));
  document.querySelectorAll(".slides > section").forEach(fit);
  document.body.dataset.ready = "yes";
}

addEventListener("load", start);
