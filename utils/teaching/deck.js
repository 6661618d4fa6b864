// Starts the deck, then makes the text of each slide as large as fits: fonts differ from machine to machine. Where a
// picture becomes larger beside its text than between question and answer, it stands beside it.
const LARGEST = 26, SMALLEST = 17, PICTURE = 230, BETTER = 1.2;

function tooFull(section) {
  const edge = section.getBoundingClientRect();
  const scale = edge.width / section.offsetWidth;
  const inner = [...section.children].filter(part => !part.matches("aside"));
  const over = inner.some(part => part.getBoundingClientRect().bottom > edge.bottom - 40 * scale
    || part.scrollWidth > part.clientWidth + 1);
  const pictures = [...section.querySelectorAll(".figures, .view")];
  return over || pictures.some(part => part.offsetHeight < PICTURE);
}

function largestText(section) {
  for (let size = LARGEST; size >= SMALLEST; size -= 1) {
    section.style.fontSize = size + "px";
    if (!tooFull(section)) return true;
  }
  return false;
}

// The area in which a slide's only picture is seen.
function seen(image) {
  const shape = image.naturalWidth / image.naturalHeight;
  return Math.min(image.offsetWidth, image.offsetHeight * shape) ** 2 / shape;
}

function fit(section) {
  const images = section.querySelectorAll(".figures img");
  if (images.length != 1 || section.querySelectorAll(".said, .predict, .answer").length == 0) return largestText(section);
  const stacked = largestText(section), area = seen(images[0]);
  section.classList.add("beside");
  if (largestText(section) && (!stacked || seen(images[0]) > BETTER * area)) return;
  section.classList.remove("beside");
  largestText(section);
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
