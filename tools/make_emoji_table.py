"""Write the table of captioned emoji from which the demonstration's data set is made.

Unicode's names are lower-cased and repaired where they say what nobody sees: in them "black" and "white" mean filled
and outlined (`HEAVY BLACK HEART` is a red heart), and some describe the character instead of the picture. A caption is
the repaired name, then its kind, so that the distinguishing words come first: "strawberry, a fruit food emoji".

The shipped shards are made by

    npm install emoji-datasource-google@16.0.0
    python tools/make_emoji_table.py node_modules/emoji-datasource-google emoji.jsonl
    python tools/make_shards.py emoji.jsonl --image-root node_modules/emoji-datasource-google \
        --output ldm_train/assets/noto_emoji --samples-per-shard 478 --format webp-lossless --shuffle-seed 0 --overwrite
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

# Names by short_name where Unicode's own name misleads about colour or subject.
NAMES = {
    "100": "red hundred points",
    "1234": "blue button with numbers 1234",
    "8ball": "black billiard ball with 8",
    "a": "red button with letter a",
    "ab": "red button with letters ab",
    "abc": "blue button with letters abc",
    "abcd": "blue button with small letters abcd",
    "accept": "orange japanese acceptable button",
    "adult": "adult person",
    "arrow_backward": "orange play backward button",
    "arrow_double_down": "orange fast down button",
    "arrow_double_up": "orange fast up button",
    "arrow_down": "down arrow",
    "arrow_down_small": "orange down button",
    "arrow_forward": "orange play button",
    "arrow_left": "left arrow",
    "arrow_right": "right arrow",
    "arrow_up": "up arrow",
    "arrow_up_small": "orange up button",
    "b": "red button with letter b",
    "bamboo": "bamboo and pine decoration",
    "bangbang": "red double exclamation mark",
    "beginner": "green and yellow japanese beginner badge",
    "black_circle": "black circle",
    "black_joker": "joker playing card",
    "black_left_pointing_double_triangle_with_vertical_bar": "last track button",
    "capital_abcd": "blue button with capital letters abcd",
    "cl": "red button with letters cl",
    "closed_book": "red closed book",
    "clubs": "black club suit",
    "congratulations": "red japanese congratulations button",
    "cool": "blue cool button",
    "dancer": "woman dancing in a red dress",
    "dancers": "people with bunny ears",
    "diamonds": "red diamond suit",
    "eight_pointed_black_star": "orange eight pointed star",
    "eight_spoked_asterisk": "green eight spoked asterisk",
    "exclamation": "red exclamation mark",
    "family": "family of three",
    "fast_forward": "orange fast forward button",
    "fist": "raised fist",
    "flags": "carp streamers",
    "free": "blue free button",
    "grey_exclamation": "white exclamation mark",
    "grey_question": "white question mark",
    "haircut": "person getting haircut",
    "hankey": "pile of poo",
    "heart": "red heart",
    "hearts": "red heart suit",
    "heavy_check_mark": "black check mark",
    "heavy_division_sign": "black division sign",
    "heavy_dollar_sign": "green dollar sign",
    "heavy_equals_sign": "black equals sign",
    "heavy_heart_exclamation_mark_ornament": "red heart exclamation mark",
    "heavy_minus_sign": "black minus sign",
    "heavy_multiplication_x": "black multiplication sign",
    "heavy_plus_sign": "black plus sign",
    "hocho": "kitchen knife",
    "id": "purple id button",
    "ideograph_advantage": "red japanese bargain button",
    "interrobang": "red exclamation and question mark",
    "keycap_star": "keycap asterisk",
    "lips": "pink lips",
    "m": "blue circled letter m",
    "mahjong": "mahjong tile with red dragon",
    "massage": "person getting massage",
    "mens": "men's room sign",
    "moon": "waxing gibbous moon",
    "negative_squared_cross_mark": "green button with cross mark",
    "new": "blue new button",
    "ng": "blue button with letters ng",
    "no_good": "person gesturing no",
    "o": "hollow red circle",
    "o2": "red button with letter o",
    "ok": "blue ok button",
    "ok_woman": "person gesturing ok",
    "parking": "blue parking button with letter p",
    "person_in_tuxedo": "person in tuxedo",
    "phone": "red telephone",
    "point_down": "hand pointing down",
    "point_left": "hand pointing left",
    "point_right": "hand pointing right",
    "point_up": "index finger pointing up",
    "point_up_2": "hand pointing up",
    "question": "red question mark",
    "recycle": "green recycling symbol",
    "red_circle": "large red circle",
    "relaxed": "gently smiling face",
    "repeat": "orange repeat button",
    "repeat_one": "orange repeat one button",
    "rewind": "orange rewind button",
    "rice_scene": "moon viewing ceremony",
    "sa": "blue japanese service charge button",
    "koko": "blue japanese here button",
    "scissors": "red scissors",
    "secret": "red japanese secret button",
    "sos": "red sos button",
    "space_invader": "purple alien monster",
    "spades": "black spade suit",
    "speaker": "quiet speaker",
    "star": "yellow star",
    "star2": "glowing yellow star",
    "sunny": "yellow sun with rays",
    "symbols": "blue button with symbols",
    "tm": "trade mark sign",
    "u5272": "red japanese discount button",
    "u5408": "red japanese passing grade button",
    "u55b6": "orange japanese open for business button",
    "u6307": "green japanese reserved button",
    "u6708": "orange japanese monthly amount button",
    "u6709": "orange japanese not free of charge button",
    "u6e80": "red japanese no vacancy button",
    "u7121": "orange japanese free of charge button",
    "u7533": "orange japanese application button",
    "u7981": "red japanese prohibited button",
    "u7a7a": "blue japanese vacancy button",
    "up": "blue up button",
    "vs": "orange versus button",
    "white_check_mark": "green button with white check mark",
    "white_circle": "white circle",
    "womens": "women's room sign",
    "x": "red cross mark",
}

# Kinds by subcategory where reversing "animal-bird" to "bird animal" would read badly.
KINDS = {
    "alphanum": "letters symbol",
    "av-symbol": "player symbol",
    "award-medal": "award medal",
    "body-parts": "body part",
    "book-paper": "book or paper",
    "cat-face": "cat face",
    "country-flag": "country flag",
    "face-neutral-skeptical": "neutral face",
    "geometric": "geometric shape",
    "hand-fingers-closed": "closed hand",
    "hand-fingers-open": "open hand",
    "hand-fingers-partial": "hand gesture",
    "hand-prop": "hand with prop",
    "hand-single-finger": "pointing hand",
    "monkey-face": "monkey face",
    "musical-instrument": "musical instrument",
    "other-object": "object",
    "other-symbol": "symbol",
    "person-activity": "person in action",
    "person-role": "person at work",
    "person-symbol": "person symbol",
    "plant-other": "plant",
    "place-other": "place",
    "skin-tone": "skin tone",
    "sky & weather": "sky and weather",
    "subdivision-flag": "country flag",
    "transport-sign": "transport sign",
    "warning": "warning sign",
}

REPAIRS = (
    (r"^keycap: ", "keycap "),
    (r"^(man|woman|person): bald$", r"bald \1"),
    (r"^(man|woman|person): ", r"\1 with "),
    (r"^(family|kiss): ", r"\1 of "),
    (r"^couple with heart: ", "couple with heart, "),
    (r"\b(wo)?mans\b", r"\1man's"),
    (r"oclock\b", "o'clock"),
    (r"^(new|full|first quarter|last quarter|wan\w+ \w+|wax\w+ \w+) moon symbol$", r"\1 moon"),
    (r"^input symbol for ", "button with "),
    (r"^(hash) key$", r"keycap \1"),
    (r" in silhouette$", " silhouette"),
    (r" sign$(?<=hand sign|s up sign|down sign|ands sign)", ""),
    (r"^emoji modifier fitzpatrick ", "skin tone "),
)


def subject(emoji: dict) -> str:
    """What the picture shows, in lower-case words."""
    if emoji["short_name"] in NAMES:
        return NAMES[emoji["short_name"]]
    name = emoji["name"].replace("\u2019", "'")
    if emoji["subcategory"] in ("country-flag", "subdivision-flag"):
        return "flag of " + name.removesuffix(" Flag").lower()
    name = name.lower()
    for pattern, replacement in REPAIRS:
        name = re.sub(pattern, replacement, name)
    return name


def kind(subcategory: str) -> str:
    """The subcategory as a noun phrase: "animal-bird" is a "bird animal"."""
    words = KINDS.get(subcategory) or " ".join(reversed(subcategory.split("-", 1)))
    return words.replace("&", "and")


def caption(emoji: dict) -> str:
    """The emoji's caption, distinguishing words first."""
    noun = kind(emoji["subcategory"])
    return f"{subject(emoji)}, {'an' if noun[0] in 'aeiou' else 'a'} {noun} emoji"


def rows(package: Path) -> list[dict[str, str]]:
    """One row per emoji that has a picture, in Unicode's order."""
    emoji = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    kept = ("name", "short_name", "category", "subcategory", "unified")
    return [
        {"image": f"img/google/64/{e['image']}", "caption": caption(e)} | {field: e[field] for field in kept}
        for e in sorted(emoji, key=lambda e: e["sort_order"])
        if e["has_img_google"]
    ]


def main() -> None:
    """Read the package, write the table, report repeated captions."""
    parser = argparse.ArgumentParser(description="Write a table of captioned emoji (JSON lines).")
    parser.add_argument("package", type=Path, help="the npm package's folder, which holds emoji.json and img/")
    parser.add_argument("table", type=Path, help="the .jsonl file to write")
    arguments = parser.parse_args()
    table = rows(arguments.package)
    arguments.table.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table), encoding="utf-8")
    repeated = {text: n for text, n in Counter(row["caption"] for row in table).items() if n > 1}
    print(f"{len(table)} emoji in {arguments.table}, {len(repeated)} repeated captions {sorted(repeated) or ''}")


if __name__ == "__main__":
    main()
