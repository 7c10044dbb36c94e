"""The words in a PDF as Chromium writes it: glyphs through each font's ToUnicode table."""

import re
import unicodedata
import zlib


def pdf_text(data):
    """All text without any white space and ligatures (NFKC), in the order of the file's streams."""
    objects = {int(number): body for number, body in _objects(data)}
    fonts = {}
    for body in objects.values():
        for name, font in re.findall(rb"/(F\d+) (\d+) 0 R", body):
            table = re.search(rb"/ToUnicode (\d+) 0 R", objects.get(int(font), b""))
            if table:
                fonts[name] = _unicode(_stream(objects[int(table[1])]))
    text = "".join(_words(_stream(body), fonts) for body in objects.values())
    return unicodedata.normalize("NFKC", text)


def _objects(data):
    for found in re.finditer(rb"\n(\d+) 0 obj\b", data):
        yield found[1], data[found.end() : data.find(b"\nendobj", found.end())]


def _stream(body):
    """The unpacked stream of an object; empty where it has none."""
    start = re.search(rb"stream\r?\n", body)
    if not start or b"/FlateDecode" not in body[: start.start()]:
        return b""
    return zlib.decompressobj().decompress(body[start.end() :])


def _unicode(table):
    """Glyph to text, of the ranges and single glyphs of a ToUnicode table."""
    out = {}
    for block in re.findall(rb"beginbfchar(.*?)endbfchar", table, re.DOTALL):
        for glyph, text in re.findall(rb"<(\w+)>\s*<(\w+)>", block):
            out[int(glyph, 16)] = bytes.fromhex(text.decode()).decode("utf-16-be")
    for block in re.findall(rb"beginbfrange(.*?)endbfrange", table, re.DOTALL):
        for first, last, text in re.findall(rb"<(\w+)>\s*<(\w+)>\s*<(\w+)>", block):
            for i in range(int(last, 16) - int(first, 16) + 1):
                out[int(first, 16) + i] = chr(int(text, 16) + i)
    return out


def _words(stream, fonts):
    """What a stream draws."""
    out, table = [], {}
    for name, glyphs in re.findall(rb"/(F\d+) [\d.]+ Tf|<([0-9A-Fa-f]+)>", stream):
        if name:
            table = fonts.get(name, {})
        else:
            out += [table.get(int(glyphs[i : i + 4], 16), "") for i in range(0, len(glyphs), 4)]
    return re.sub(r"\s", "", "".join(out))
