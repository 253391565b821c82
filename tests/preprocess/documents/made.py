"""Documents whose words have known places: a writer of small PDFs, and of OCR in every layout."""

import io

from PIL import Image, ImageDraw

LETTER = {"width": 612.0, "height": 792.0}
ADVANCE, SIZE = 0.6, 20
"""Courier: every character is 0.6 of the size wide."""


def pdf(pages, *, rotate=0, crop=None, form=False, width=612, height=792):
    """Writes a PDF: of each page a list of (text, x, y), points from the lower left corner."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Courier >>")
    kids = []
    for words in pages:
        text = "\n".join(
            f"BT /F1 {SIZE} Tf {x} {y} Td ({escaped(word)}) Tj ET" for word, x, y in words
        )
        objects.append(f"<< /Length {len(text)} >>\nstream\n{text}\nendstream")
        box = f"/CropBox [{' '.join(map(str, crop))}]" if crop else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] {box} "
            f"/Rotate {rotate} /Contents {len(objects)} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    return assembled(objects)


def assembled(objects, *, trailer=""):
    out, offsets = io.BytesIO(b""), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1"))
    start = out.tell()
    rows = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    out.write(
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{rows}"
        f"trailer << /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\n"
        f"startxref\n{start}\n%%EOF".encode()
    )
    return out.getvalue()


def encrypted():
    """Writes a PDF whose password is not the empty one."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [] /Count 0 >>",
        f"<< /Filter /Standard /V 1 /R 2 /P -4 /O <{'11' * 32}> /U <{'22' * 32}> >>",
    ]
    return assembled(objects, trailer=f"/Encrypt 3 0 R /ID [<{'33' * 16}> <{'33' * 16}>]")


def many_pages(number):
    """Writes a PDF of which every page is the same object, so that it is small."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{'3 0 R ' * number}] /Count {number} >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] >>",
    ]
    return assembled(objects)


def escaped(text):
    return text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def tiff(sizes):
    """Writes a TIFF with a page of each size, each with a shade of its own."""
    pages = [Image.new("L", size, 40 * (number + 1)) for number, size in enumerate(sizes)]
    stream = io.BytesIO()
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:], compression="raw")
    return stream.getvalue()


def page_picture(size=(300, 200), box=(30, 40, 90, 60)):
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle(box, fill="black")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


WORDS = [
    ("Total", (30, 40, 90, 60), 0),
    ("12.50", (100, 40, 150, 60), 0),
    ("EUR", (30, 80, 60, 95), 1),
]
"""On a page of 300 x 200 pixels: text, box, line."""


def hocr(words=WORDS, size=(300, 200)):
    lines = {}
    for text, box, line in words:
        place = " ".join(map(str, box))
        lines.setdefault(line, []).append(
            f'<span class="ocrx_word" title="bbox {place}; x_wconf 93">'
            f"<strong>{text}</strong></span>"
        )
    body = "".join(
        f'<span class="ocr_line" title="bbox 0 0 {size[0]} {size[1]}">'
        f"{'&nbsp;'.join(found)}</span><br>"
        for found in lines.values()
    )
    return (
        '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "http://www.w3.org/x.dtd">'
        f'<html xmlns="http://www.w3.org/1999/xhtml"><body><div class="ocr_page" '
        f'title="image; bbox 0 0 {size[0]} {size[1]}; ppageno 0">{body}</div></body></html>'
    ).encode()


def alto(words=WORDS, size=(300, 200), *, unit="pixel", scale=1):
    lines = {}
    for text, (x0, y0, x1, y1), line in words:
        lines.setdefault(line, []).append(
            f'<String CONTENT="{text}" HPOS="{x0 * scale}" VPOS="{y0 * scale}" '
            f'WIDTH="{(x1 - x0) * scale}" HEIGHT="{(y1 - y0) * scale}" WC="0.9"/><SP/>'
        )
    body = "".join(f"<TextLine>{''.join(found)}</TextLine>" for found in lines.values())
    return (
        '<?xml version="1.0" encoding="UTF-8"?><alto xmlns="http://www.loc.gov/standards/alto/ns-v4#">'
        f"<Description><MeasurementUnit>{unit}</MeasurementUnit></Description><Layout>"
        f'<Page WIDTH="{size[0] * scale}" HEIGHT="{size[1] * scale}"><PrintSpace><TextBlock>'
        f"{body}</TextBlock></PrintSpace></Page></Layout></alto>"
    ).encode()


def page_xml(words=WORDS, size=(300, 200)):
    """Writes regions in the wrong order; their reading order puts them right."""
    lines = {}
    for text, (x0, y0, x1, y1), line in words:
        points = f"{x0},{y0} {x1},{y0} {x1},{y1} {x0},{y1}"
        lines.setdefault(line, []).append(
            f'<Word><Coords points="{points}"/><TextEquiv index="1"><Unicode>wrong</Unicode>'
            f'</TextEquiv><TextEquiv index="0"><Unicode>{text}</Unicode></TextEquiv></Word>'
        )
    regions = [
        f'<TextRegion id="r{line}"><TextLine>{"".join(found)}</TextLine></TextRegion>'
        for line, found in lines.items()
    ]
    order = "".join(
        f'<RegionRefIndexed index="{line}" regionRef="r{line}"/>' for line in reversed(lines)
    )
    return (
        '<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15">'
        f'<Page imageWidth="{size[0]}" imageHeight="{size[1]}"><ReadingOrder>'
        f'<OrderedGroup id="g">{order}</OrderedGroup></ReadingOrder>{"".join(reversed(regions))}'
        "</Page></PcGts>"
    ).encode()


def corners(box):
    x0, y0, x1, y1 = box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def azure(words=WORDS, size=(300, 200), *, unit="pixel", scale=1.0):
    lines = {}
    for text, box, line in words:
        place = [scale * value for value in corners(box)]
        lines.setdefault(line, []).append({"text": text, "boundingBox": place})
    page = {"page": 1, "width": scale * size[0], "height": scale * size[1], "unit": unit}
    page["lines"] = [{"text": "", "boundingBox": [], "words": found} for found in lines.values()]
    return {"status": "Succeeded", "recognitionResults": [page]}


def textract(words=WORDS, size=(300, 200)):
    def place(box):
        x0, y0, x1, y1 = box
        shares = {"Left": x0 / size[0], "Top": y0 / size[1]}
        shares |= {"Width": (x1 - x0) / size[0], "Height": (y1 - y0) / size[1]}
        return {"BoundingBox": shares}

    lines = {}
    blocks = [{"BlockType": "PAGE", "Id": "p", "Page": 1}]
    for number, (text, box, line) in enumerate(words):
        lines.setdefault(line, []).append(f"w{number}")
        blocks.append(
            {
                "BlockType": "WORD",
                "Id": f"w{number}",
                "Text": text,
                "Geometry": place(box),
                "Page": 1,
            }
        )
    blocks += [
        {
            "BlockType": "LINE",
            "Id": f"l{line}",
            "Text": "",
            "Page": 1,
            "Relationships": [{"Type": "CHILD", "Ids": ids}],
        }
        for line, ids in lines.items()
    ]
    return {"Blocks": blocks}


def funsd(words=WORDS):
    """Writes the words backwards: the order of a list of FUNSD means nothing."""
    labels = ["question", "answer", "other"]
    entries = [
        {
            "id": number,
            "text": text,
            "box": list(box),
            "label": labels[number % 3],
            "words": [{"text": text, "box": list(box)}, {"text": "", "box": list(box)}],
            "linking": [[0, 1]] if number < 2 else [],
        }
        for number, (text, box, _) in enumerate(words)
    ]
    return {"form": entries[::-1]}
