r"""Final answers in boxes: \boxed{…}, as solutions in the form of MATH have them."""

BOXED = r"\boxed{"


def boxed(text: str) -> list[str]:
    r"""Returns what stands in each \boxed{…} of a text, braces matched; one that never ends is left out."""
    found, start = [], text.find(BOXED)
    while start >= 0:
        depth, at = 1, start + len(BOXED)
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            found.append(text[start + len(BOXED) : at - 1])
        start = text.find(BOXED, at)
    return found
