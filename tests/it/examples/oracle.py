"""Independent judgements for the tests of the examples: oracle.py WHAT < INPUT > JSON.

csv    a table: the report that csv-report should give, grouped by city, prices summed
young  a list of people: what the filter of the test of jaq should give
html   a fragment: its elements, attributes and text, as a browser would see them
pdf    a document: its text, page by page (needs pypdf)
"""

import csv
import html.parser
import io
import json
import math
import sys
from fractions import Fraction


def number(value):
    try:
        parsed = float(value)
    except ValueError:
        return None
    return Fraction(value) if math.isfinite(parsed) else None


def column(name, values):
    filled = [value for value in values if value]
    numbers = [number(value) for value in filled]
    distinct = len(set(filled))
    report = {
        "name": name,
        "kind": "text",
        "empty": len(values) - len(filled),
        "distinct": distinct if distinct <= 10_000 else None,
        "numbers": None,
    }
    if not filled:
        report["kind"] = "empty"
    elif None not in numbers:
        report["kind"] = "number" if any("." in value for value in filled) else "integer"
        total = sum(numbers)
        report["numbers"] = {
            "min": float(min(numbers)),
            "max": float(max(numbers)),
            "sum": float(total),
            "mean": float(total / len(numbers)),
        }
    return report


def table(text):
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    groups = {}
    for row in rows:
        group = groups.setdefault(row["city"], [0, Fraction(0)])
        group[0] += 1
        group[1] += Fraction(row["price"])
    return {
        "rows": len(rows),
        "columns": [column(name, [row[name] for row in rows]) for name in rows[0]],
        "groups": {name: {"rows": n, "sum": float(total)} for name, (n, total) in groups.items()},
    }


def young(text):
    ages = {}
    for person in json.loads(text):
        if person["age"] < 18:
            ages.setdefault(person["age"], []).append(person["name"])
    return [
        {"age": age, "n": len(names), "last": max(names, key=lambda name: name.encode())}
        for age, names in sorted(ages.items())
    ]


class Elements(html.parser.HTMLParser):
    """Collects what a page consists of."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append({"tag": tag, "attributes": dict(attrs), "text": ""})

    def handle_data(self, data):
        if self.found:
            self.found[-1]["text"] += data

    def handle_comment(self, data):
        self.found.append({"tag": "<!-- -->", "attributes": {}, "text": data})

    def handle_decl(self, decl):
        self.handle_comment(decl)

    def handle_pi(self, data):
        self.handle_comment(data)


def elements(text):
    parser = Elements()
    parser.feed(text)
    parser.close()
    return parser.found


def pdf(data):
    import pypdf

    # Strict: a wrong offset in the table of objects is an error.
    reader = pypdf.PdfReader(io.BytesIO(data), strict=True)
    return [page.extract_text().splitlines() for page in reader.pages]


def main():
    data = sys.stdin.buffer.read()
    what = {
        "csv": lambda: table(data.decode()),
        "young": lambda: young(data.decode()),
        "html": lambda: elements(data.decode()),
        "pdf": lambda: pdf(data),
    }
    json.dump(what[sys.argv[1]](), sys.stdout)


main()
