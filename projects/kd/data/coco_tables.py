"""What the tables of a COCO file have to hold: rows are read by their meaning, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import DataError
from .coco_values import flag, id_key, is_box, number, shown

MAX_SIZE = 10**6  # pixels; of the sides of an image


def read_images(json_file: str, rows: list[dict]) -> dict:
    """Images by the meaning of their id."""

    def sides(row: dict) -> list:
        return [number(row["width"]), number(row["height"])]

    def part_of_a_pixel(side: float) -> bool:
        return side != int(side) or side > MAX_SIZE

    needed = ("id", "file_name", "width", "height")
    _refuse(json_file, "image", rows, _lacks(*needed), f"lacks one of {', '.join(needed)}")
    _refuse_ids(json_file, "image", rows)
    _refuse(
        json_file,
        "image",
        rows,
        lambda row: not isinstance(row["file_name"], str) or not row["file_name"],
        "has a file_name that is no text",
        "file_name",
    )
    for is_wrong, what in (
        (lambda row: None in sides(row), "is no number"),
        (lambda row: min(sides(row)) <= 0, "is not positive"),
        (
            lambda row: any(map(part_of_a_pixel, sides(row))),
            f"is no whole number of pixels up to {MAX_SIZE}",
        ),
    ):
        what = f"has a width or height that {what}"
        _refuse(json_file, "image", rows, is_wrong, what, "width", "height")
    for row in rows:
        row["width"], row["height"] = int(number(row["width"])), int(number(row["height"]))
    return {id_key(row["id"]): row for row in rows}


def read_categories(json_file: str, rows: list[dict]) -> dict:
    """Categories by the meaning of their id, with names that are text."""

    def no_name(row: dict) -> bool:
        name = row["name"]
        return number(name) is None and not (isinstance(name, str) and name)

    _refuse(json_file, "category", rows, _lacks("id", "name"), "lacks id or name")
    _refuse_ids(json_file, "category", rows)
    _refuse(json_file, "category", rows, no_name, "has a name that is no text", "name")
    for row in rows:
        row["name"] = str(row["name"])
    _refuse(
        json_file,
        "category",
        rows,
        _seen_before(lambda row: row["name"]),
        "has a name that another category has too",
        "name",
    )
    kinds = {isinstance(row["id"], str): row["id"] for row in rows}
    if len(kinds) > 1:
        raise DataError(
            f"{json_file}: ids of categories are numbers ({kinds[False]}) and text "
            f'("{kinds[True]}"), so that their order, that of the classes, is not clear: '
            "write all as numbers"
        )
    return {id_key(row["id"]): row for row in rows}


def read_annotations(
    json_file: str, rows: list[dict], images: dict, categories: dict
) -> list[dict]:
    """Annotations whose ids are those of the tables, with flags and areas that can be used."""
    _refuse(json_file, "annotation", rows, lambda row: row.get("id") is None, "has no id")
    _refuse_ids(json_file, "annotation", rows)
    for key, table, name in (
        ("image_id", images, "images"),
        ("category_id", categories, "categories"),
    ):
        _refuse(
            json_file,
            "annotation",
            rows,
            lambda row, key=key, table=table: id_key(row.get(key)) not in table,
            f"has {'an' if key[0] == 'i' else 'a'} {key} not in '{name}'",
            key,
        )
    for is_wrong, what, key in (
        (lambda row: not is_box(row.get("bbox")), "has no bbox of four numbers", "bbox"),
        (lambda row: row.get("ignore"), 'has "ignore": write "iscrowd": 1 instead', "ignore"),
        (
            lambda row: flag(row.get("iscrowd")) is None,
            "has an iscrowd that is neither 0 nor 1",
            "iscrowd",
        ),
    ):
        _refuse(json_file, "annotation", rows, is_wrong, what, key)
    for row in rows:
        row["image_id"] = images[id_key(row["image_id"])]["id"]
        row["category_id"] = categories[id_key(row["category_id"])]["id"]
        row["iscrowd"] = flag(row.get("iscrowd"))
    return rows


def by_id(rows: list[dict]) -> list[dict]:
    """By ascending id, if all are whole numbers (text of digits is); else nothing."""
    keys = []
    for row in rows:
        key = id_key(row["id"])
        if isinstance(key, str) and key.isdecimal() and len(key) < 100:
            key = int(key)
        if not isinstance(key, int):
            return []
        keys.append(key)
    return [rows[i] for i in sorted(range(len(rows)), key=keys.__getitem__)]


def _lacks(*keys: str) -> Callable[[dict], bool]:
    return lambda row: any(row.get(key) is None for key in keys)


def _seen_before(key_of: Callable[[dict], object]) -> Callable[[dict], bool]:
    seen: set = set()
    return lambda row: key_of(row) in seen or seen.add(key_of(row)) is not None


def _refuse_ids(json_file: str, kind: str, rows: list[dict]) -> None:
    _refuse(
        json_file,
        kind,
        rows,
        lambda row: id_key(row["id"]) is None,
        "has an id that is neither a number nor text",
    )
    is_second = _seen_before(lambda row: id_key(row["id"]))
    _refuse(json_file, kind, rows, is_second, "has an id that is used twice")


def _refuse(json_file: str, kind: str, rows: Iterable[dict], is_wrong, what: str, *keys) -> None:
    """DataError that names the first row that is wrong, its values under keys, and the count."""
    wrong = [row for row in rows if is_wrong(row)]
    if wrong:
        row = wrong[0]
        name = f"{kind} {row['id'] if id_key(row.get('id')) is not None else shown(row, 120)}"
        values = [shown(row[key]) for key in keys if key in row]
        detail = f" ({' x '.join(values)})" if values else ""
        more = f"; so do {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(f"{json_file}: {name} {what}{detail}{more}")
