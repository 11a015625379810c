"""The report's looks: one style sheet and one short script, both put inside the page.

Two hues mean the two models everywhere, vermilion for undefended and blue for immunised (after Okabe and Ito, told
apart under every common colour blindness). Undefended is dashed too, so that it survives black-and-white paper. Grey
means clean.
"""

STYLE = """
:root {
  color-scheme: light; --page: #f5f6f7; --card: #fff; --ink: #171c21; --soft: #545e69; --edge: #dde1e6;
  --grid: #e8ebee; --undefended: #c24e00; --immunised: #0a66ad; --clean: #6c7681; --good: #0f7a45; --bad: #b4123f;
  --warn: #fff6e0; --warn-edge: #d9a514;
}
@media screen and (prefers-color-scheme:dark) {
  :root {
    color-scheme: dark; --page: #0e1216; --card: #161b21; --ink: #e9edf1; --soft: #a3adb8; --edge: #2b323a;
    --grid: #262d34; --undefended: #ff9a55; --immunised: #63b3f7; --clean: #98a3af; --good: #56c98b;
    --bad: #ff86a0; --warn: #2a2412; --warn-edge: #8f7420;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto, "Helvetica Neue",Arial,sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px }
.eyebrow { margin: 0 0 10px; color: var(--soft); font-size: 13px; letter-spacing: .02em }
h1 {
  margin: 0; max-width: 30em; font-size: clamp(23px,3.3vw,32px); line-height: 1.25; font-weight: 680;
  letter-spacing: -.012em; text-wrap: balance;
}
.lead { margin: 12px 0 0; max-width: 46em; font-size: 17px; color: var(--soft) }
nav {
  display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 22px 0 0; padding: 10px 0 0;
  border-top: 1px solid var(--edge); font-size: 13.5px;
}
nav a { color: var(--soft); text-decoration: none }
nav a:hover, nav a:focus { color: var(--ink); text-decoration: underline }
.caveats {
  margin: 20px 0 0; padding: 12px 16px; background: var(--warn); border-left: 4px solid var(--warn-edge);
  border-radius: 4px;
}
.caveats p { margin: 0; font-weight: 650 }
.caveats ul { margin: 4px 0 0; padding-left: 18px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit,minmax(236px,1fr)); gap: 14px; margin: 24px 0 0 }
.card {
  background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 18px 20px; min-width: 0;
}
.tile h3 { margin: 0 0 8px; font-size: 13px; font-weight: 600; color: var(--soft) }
.tile .row { display: flex; justify-content: space-between; align-items: baseline; gap: 0 10px; margin-top: 6px }
.tile { padding: 16px 18px }
.tile .key { font-size: 14px }
.tile .row b { font-size: 20px; font-weight: 680; letter-spacing: -.01em; line-height: 1.15 }
.tile .row b.words { font-size: 14px; font-weight: 500; color: var(--soft) }
.meter { height: 5px; margin-top: 4px; border-radius: 3px; background: var(--grid); overflow: hidden }
.meter i { display: block; height: 100%; background: var(--role); border-radius: 3px; min-width: 2px }
.tile .note { margin: 8px 0 0 }
section { margin-top: 46px; scroll-margin-top: 12px }
h2 { margin: 0 0 4px; font-size: 21px; line-height: 1.3; letter-spacing: -.008em }
h3 { margin: 0 0 6px; font-size: 15px }
.about { margin: 0 0 16px; max-width: 50em; color: var(--soft) }
.absent { margin: 0; padding: 12px 16px; border: 1px dashed var(--edge); border-radius: 8px; color: var(--soft) }
.note { color: var(--soft); font-size: 13px; margin: 10px 0 0; max-width: 60em }
.pair { display: grid; grid-template-columns: repeat(auto-fit,minmax(min(100%,400px),1fr)); gap: 14px }
.stack { display: grid; gap: 14px; align-content: start }
.whole { white-space: nowrap }
.last { margin-top: 14px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px }
caption { text-align: left; font-weight: 650; padding-bottom: 8px }
th, td { padding: 8px 14px 8px 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--edge) }
tbody tr:last-child>* { border-bottom: 0 }
th:first-child, td:first-child, .left td, .left th { text-align: left }
th:last-child, td:last-child { padding-right: 0 }
thead th { font-size: 13px; font-weight: 600; color: var(--soft); white-space: nowrap }
tbody th { font-weight: 500 }
caption + thead + tbody > tr > * { white-space: nowrap }
td small, th small { display: block; color: var(--soft); font-size: 12px; font-weight: 400 }
td .absent-value { color: var(--soft); font-size: 13px }
tr.part th { padding-top: 16px; color: var(--soft); font-size: 13px; font-weight: 600 }
.undefended { --role: var(--undefended); --dash: 6 3.5 }
.immunised { --role: var(--immunised); --dash: none }
.clean { --role: var(--clean); --dash: none }
.total { --role: var(--ink); --dash: none }
.part-loss { --role: var(--clean); --dash: 5 3 }
.chance { --role: var(--clean); --dash: 2 4 }
.key { display: inline-flex; align-items: center; gap: 7px; white-space: nowrap }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 0 0 6px; padding: 0; list-style: none; font-size: 13px;
}
svg.swatch { flex: none; overflow: visible }
figure { margin: 0 }
svg.chart { display: block; width: 100%; max-width: 560px; height: auto; margin: 4px auto 0; overflow: visible }
svg text { font-size: 12px; fill: var(--soft) }
svg .tick.y, svg .name, svg .rule.before { text-anchor: end }
svg .x { text-anchor: middle }
svg text.title { font-size: 12px; fill: var(--ink) }
svg text.rule { font-size: 11.5px; fill: var(--ink) }
svg text.end { fill: var(--role); font-weight: 650 }
svg text.value, svg text.name { fill: var(--ink) }
svg .sub { font-size: .78em }
sub { font-size: .72em; line-height: 0 }
svg path { fill: none }
.grid { stroke: var(--grid) }
.axis { stroke: var(--clean) }
path.rule { stroke: var(--ink); stroke-dasharray: 3 3; opacity: .65 }
path.line {
  stroke: var(--role); stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: butt;
  stroke-dasharray: var(--dash);
}
path.chance { stroke-width: 1.4 }
svg path.area { fill: var(--role); opacity: .16 }
svg path.area.clean { opacity: .3 }
svg path.band { fill: var(--role); opacity: .18 }
path.line.clean { stroke-width: 1.4 }
.marker { fill: var(--card); stroke: var(--role); stroke-width: 2.2 }
.marker.immunised { fill: var(--role) }
.bar { fill: var(--role) }
.hit { fill: transparent; stroke: none }
rect.hit:hover { fill: var(--ink); opacity: .06 }
circle.hit:hover { fill: var(--role,var(--ink)); opacity: .18 }
#tip {
  position: fixed; z-index: 9; pointer-events: none; max-width: 280px; padding: 5px 9px; border-radius: 5px;
  background: var(--ink); color: var(--card); font-size: 13px; line-height: 1.4; opacity: 0;
}
.pictures {
  display: grid; grid-template-columns: repeat(auto-fill,minmax(min(100%,310px),1fr)); gap: 14px;
  margin-bottom: 26px;
}
.picture h4 { margin: 0; font-size: 14.5px; line-height: 1.35 }
.picture .truth { margin: 0 0 10px; font-size: 13px; color: var(--soft) }
.strip { display: grid; grid-template-columns: repeat(3,1fr); gap: 8px }
.strip figcaption { margin-top: 3px; font-size: 12px; color: var(--soft); text-align: center }
.strip img, .strip .noimage {
  display: block; width: 100%; aspect-ratio: 1; border: 1px solid var(--edge); border-radius: 4px;
  image-rendering: pixelated; object-fit: contain;
}
.strip .noimage { display: grid; place-items: center; font-size: 12px; color: var(--soft); text-align: center }
.picture table { margin-top: 10px; font-size: 13px }
.picture th, .picture td { padding: 5px 8px 5px 0 }
.mark { display: inline-flex; align-items: baseline; gap: 5px; white-space: nowrap }
.mark i { font-style: normal; font-weight: 700 }
.right i { color: var(--good) }
.wrong { font-weight: 650 }
.wrong i { color: var(--bad) }
.wrong u { text-decoration: underline wavy var(--bad) 1px; text-underline-offset: 3px }
.status { font-weight: 650; white-space: nowrap }
.status.passed { color: var(--good) }
.status.failed { color: var(--bad) }
.status.open { color: var(--soft) }
dl { margin: 0; display: grid; grid-template-columns: minmax(8em,max-content) 1fr; gap: 5px 18px; font-size: 14px }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
.definitions { grid-template-columns: minmax(8em,13em) 1fr }
.definitions dt { color: var(--ink); font-weight: 600 }
pre {
  margin: 0 0 14px; padding: 12px 14px; background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  overflow-x: auto; font: 13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
@media(max-width:560px) {
  main { padding: 24px 14px 48px }
  .card { padding: 14px }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px }
  .tile .row { display: block }
  svg text, svg text.title, svg text.rule { font-size: 13.5px }
  dl, .definitions { grid-template-columns: 1fr; gap: 0 }
  dd { margin-bottom: 8px }
  th, td { padding-right: 10px }
  td { white-space: nowrap }
  th small { display: none }
  .left td { white-space: normal }
  .scroll thead .swatch { display: none }
}
@media print {
  @page { margin: 14mm }
  :root { --page: #fff }
  body { font-size: 10.5pt }
  main { max-width: none; padding: 0 }
  nav, #tip { display: none }
  .card { border-color: #bbb; padding: 12px 14px }
  .tiles, .pair { grid-template-columns: 1fr 1fr; gap: 10px }
  .pair .scroll .swatch { display: none }
  table { font-size: 9pt }
  thead th, tr.part th { font-size: 8.5pt }
  th, td { padding: 5px 10px 5px 0 }
  .card, figure, tr, .caveats { break-inside: avoid }
  h2, h3, .about { break-after: avoid }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact }
  section { margin-top: 26px }
}
"""

# Touch and mouse alike: the text of the mark under the pointer follows it.
SCRIPT = """
const tip=document.getElementById('tip');
addEventListener('pointermove',e=>{const m=e.target.closest&&e.target.closest('[data-tip]');
if(!m){tip.style.opacity=0;return}
tip.textContent=m.dataset.tip;
tip.style.left=Math.max(4,Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8))+'px';
tip.style.top=Math.max(4,e.clientY-tip.offsetHeight-12)+'px';tip.style.opacity=1});
"""
