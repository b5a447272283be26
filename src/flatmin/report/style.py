"""The look of the page: one style sheet, light and dark, wide and narrow, on paper too."""

from __future__ import annotations

from .figures import hue

# Okabe and Ito's colour-blind safe hues, darkened for paper and lightened for night; the baseline is grey
LIGHT = ("#6d7178", "#0a66b0", "#cc5208", "#00876c", "#aa4f90", "#a87700", "#3d9ad3", "#74331f")
DARK = ("#a7abb3", "#62aef0", "#f58b4e", "#40c79f", "#e39bcc", "#e2b740", "#a5dcff", "#d69f8a")

SHEET = """
:root{color-scheme:light dark;--paper:#fbfaf6;--card:#fff;--ink:#1b1d21;--soft:#5b6068;--rule:#e2dfd6;--warn:#8a3b12;
--warn-card:#fdf3e9;--serif:"Iowan Old Style","Palatino Linotype",Palatino,"Source Serif 4",Georgia,serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;LIGHT}
@media(prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1b1e23;--ink:#eceae4;--soft:#a3a7ae;--rule:#33373e;
--warn:#f2b98d;--warn-card:#2a211b;DARK}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans);font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:clamp(28px,5vw,72px) clamp(18px,4vw,44px) 64px}
h1,h2,.lede{font-family:var(--serif);font-weight:500;text-wrap:balance}
h1{font-size:clamp(30px,4.7vw,54px);line-height:1.08;letter-spacing:-.018em;margin:.35em 0 .5em;max-width:19em;
overflow-wrap:anywhere}
h2{font-size:clamp(22px,2.4vw,29px);line-height:1.2;letter-spacing:-.008em;margin:0 0 .35em}
h3{font-size:15px;font-weight:600;margin:0 0 .1em}
p{margin:.4em 0 .9em;max-width:44em}
small,.quiet,figcaption{color:var(--soft);font-size:13.5px;line-height:1.45}
.over{color:var(--soft);font-size:13px;letter-spacing:.07em;text-transform:uppercase;margin:0}
section{margin-top:clamp(40px,5.5vw,72px);padding-top:clamp(20px,2.4vw,30px);border-top:1px solid var(--rule)}
section>p{color:var(--soft);margin-bottom:1.3em}
.hero{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:12px 56px;align-items:start}
.lede{font-size:clamp(18px,1.75vw,21px);line-height:1.45;text-wrap:pretty;margin-top:0}
.ranks{list-style:none;margin:4px 0 0;padding:0}
.ranks li{display:grid;grid-template-columns:7.2em 1fr 7.4em;gap:2px 16px;align-items:center;
padding:11px 0;border-top:1px solid var(--rule)}
.ranks li:first-child{border-top:0}
.ranks b{font:500 26px/1 var(--serif)}
.ranks span{color:var(--soft);font-size:13.5px}
.ranks svg{width:100%;height:auto;display:block}.ranks div{white-space:nowrap;text-align:right}
.ranks.many li{padding:4px 0;grid-template-columns:10em 1fr 6.4em}.ranks.many b{font-size:17px}
.nb{white-space:nowrap}
.name{font-weight:600;color:currentColor}.ranks li .name{font-size:15px;color:inherit}
.ranks div{color:var(--ink)}
.banner{background:var(--warn-card);color:var(--warn);border-left:4px solid;padding:12px 18px;border-radius:4px;
margin:0 0 28px;max-width:none}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:28px 40px}
.two>*{min-width:0}
.found ul{margin:0;padding:0;list-style:none}
.found li{padding:9px 0;border-top:1px solid var(--rule);max-width:44em}
.found li:first-child{border-top:0;padding-top:2px}
.worse{background:var(--warn-card);border-radius:10px;padding:22px 26px;align-self:start}
.worse h2{color:var(--warn)}.worse li{border-color:color-mix(in srgb,var(--warn) 22%,transparent)}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto;margin:6px 0 4px -4px}
.flatmin-surface figcaption{color:inherit}.flatmin-surface canvas{background:#fff;border-radius:8px}
svg text{font-family:var(--sans);font-variant-numeric:tabular-nums}
.s{transition:opacity .15s}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:0 0 18px;font-size:14px}
.key li{display:flex;align-items:center;gap:7px;cursor:default;border-radius:4px;outline-offset:3px}
.key svg{width:30px;height:13px}.key path{fill:none;stroke:currentColor;stroke-width:2}
.key circle,.key rect,.key path+path{fill:currentColor;stroke:none}
.key li span{color:var(--ink)}
.scroll{overflow-x:auto;margin:0 calc(-1*clamp(18px,4vw,44px));padding:0 clamp(18px,4vw,44px)}
table{border-collapse:collapse;width:100%;min-width:940px;font-size:15px}
th,td{text-align:left;vertical-align:top;padding:12px 18px 12px 0;border-bottom:1px solid var(--rule)}
thead th{font-size:13.5px;font-weight:600;line-height:1.3;border-bottom:1.5px solid var(--ink)}
thead small{display:block;font-weight:400;font-size:12px}
tbody th{font-weight:600;border-left:4px solid currentColor;padding-left:12px}
tbody th,.name{max-width:12em;min-width:min-content;overflow-wrap:normal}
th:last-child,td:last-child{white-space:nowrap;padding-right:0}
td b{font-weight:400;font-size:17px;color:var(--ink)}td.strong b{font-weight:700}
td span{color:var(--soft);font-size:13px;white-space:nowrap}td small{display:block;font-size:12px;white-space:nowrap}
.strip{display:block;width:112px;height:13.5px;margin-top:2px}
.bar{display:block;width:112px;height:5px;margin:5px 0 2px}
.bar rect{fill:currentColor;opacity:.85}.bar .open{fill:currentColor;opacity:.32}
.rail{stroke:var(--rule);stroke-width:1.2}.ticks{stroke:currentColor;stroke-width:1.2;opacity:.65}
circle{fill:currentColor}
details{margin-top:14px;border-top:1px solid var(--rule);padding-top:14px}
summary{cursor:pointer;font-weight:600}
dl{columns:2 320px;column-gap:48px;font-size:13.5px;margin:14px 0 0}
dl div{display:flex;gap:12px;justify-content:space-between;padding:4px 0;border-bottom:1px solid var(--rule);
break-inside:avoid}
dt{color:var(--soft)}dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
.caveats{columns:2 360px;column-gap:48px;padding-left:1.1em;margin:8px 0;font-size:14.5px;color:var(--soft)}
.caveats li{break-inside:avoid;margin-bottom:9px}
footer{margin-top:56px;color:var(--soft);font-size:13px}
@media(max-width:560px){.ranks li,.ranks.many li{grid-template-columns:1fr auto}.ranks svg{grid-column:1/-1;order:3}
.worse{margin:0 -8px;padding:18px 18px}tbody th{position:sticky;left:0;background:var(--paper);z-index:1}}
@media print{body{background:none}main{max-width:none;padding:0}section,figure,.worse{break-inside:avoid}}
@media(prefers-reduced-motion:reduce){.s{transition:none}}
"""


def sheet(methods: int) -> str:
    """The style sheet for so many methods: their colours, and the rules that dim the others under the pointer."""
    text = SHEET.strip().replace("LIGHT", _variables(LIGHT)).replace("DARK", _variables(DARK))
    rules = [f".s{i}{{color:var(--c{hue(i)})}}section:has(.k{i}:is(:hover,:focus-visible)) .s:not(.s{i})"
             f"{{opacity:.1}}" for i in range(methods)]
    return "\n".join([text, *rules])


def _variables(colors: tuple[str, ...]) -> str:
    return ";".join(f"--c{i}:{c}" for i, c in enumerate(colors))
