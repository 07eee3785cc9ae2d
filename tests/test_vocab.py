"""Tests of vocab.py: tables against the true ones, words that stay apart, splits, prompts typed by a user."""
# SPDX-License-Identifier: MIT
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vocab
from vocab import (
    ADE20K,
    ADE20K_INSTANCE,
    CITYSCAPES,
    COCO_INSTANCE,
    COCO_PANOPTIC,
    SHAPES,
    SHAPES_OPEN,
    Vocabulary,
)

CLASSES = Path(__file__).resolve().parents[2] / "shared" / "data" / "classes.json"
ALL = (COCO_PANOPTIC, COCO_INSTANCE, ADE20K, ADE20K_INSTANCE, CITYSCAPES, SHAPES, SHAPES_OPEN)
TRANSLATED = ALL[:5]
COCO_UNSEEN = {  # category ids as published
    "ovp_val": [5, 6, 17, 18, 21, 22, 25, 28, 32, 33, 34, 36, 41, 47, 49, 61, 63, 76, 81, 87, 92, 93, 95, 100,
                107, 109, 130, 133, 144, 145, 148, 149, 184, 185, 187, 191, 193],
    "padding_119_14": [21, 25, 33, 34, 41, 57, 87, 100, 145, 148, 149, 184, 187, 193],
    "ovcoco_48_17": [5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87],
}


@pytest.fixture(scope="module")
def truth():
    if not CLASSES.is_file():
        pytest.skip("the shared class tables are not here")
    return json.loads(CLASSES.read_text())


def by_name(table):
    return pytest.mark.parametrize("table", table, ids=lambda v: v.name)


def error(function, *args):
    """The message of the ValueError, which must be one line `<file>!<member>: <what>; <what to do>`."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        function(*args)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: [^\n]+; [^\n]+", message), message
    return message


# ---------------------------------------------------------------- tables
def test_tables_counts():
    sizes = [(len(v.names), sum(v.thing)) for v in ALL]
    assert sizes == [(133, 80), (80, 80), (150, 100), (100, 100), (19, 8), (8, 5), (34, 25)]


@by_name(ALL)
def test_tables_unique_and_typed(table):
    assert len(set(table.names)) == len(set(table.ids)) == len(table.names)
    assert all(type(i) is int for i in table.ids) and all(type(t) is bool for t in table.thing)
    assert list(table.ids) == sorted(table.ids)
    assert vocab.VOCABULARIES[table.name] is table
    hash(table)


@pytest.mark.parametrize("table, key, number", [
    (COCO_PANOPTIC, "coco_panoptic", "id"), (ADE20K, "ade20k", "index"), (CITYSCAPES, "cityscapes", "id")],
    ids=lambda v: getattr(v, "name", v))
def test_tables_equal_the_true_ones(truth, table, key, number):
    ours = list(zip(table.ids, table.names, table.thing, strict=True))
    assert ours == [(row[number], row["name"].strip(), row["thing"]) for row in truth[key]]


def test_tables_anchors():
    """Facts that hold without the shared tables: ends, sparse ids, a few rows in the middle."""
    columns = COCO_PANOPTIC.names, COCO_PANOPTIC.ids, COCO_PANOPTIC.thing
    row = {name: (number, thing) for name, number, thing in zip(*columns, strict=True)}
    assert row["person"] == (1, True) and row["toothbrush"] == (90, True) and row["banner"] == (92, False)
    assert row["rug-merged"] == (200, False) and 12 not in COCO_PANOPTIC.ids
    assert ADE20K.ids == tuple(range(150)) and ADE20K.names[149] == "flag" and ADE20K.thing[149]
    assert CITYSCAPES.names[0] == "road" and CITYSCAPES.ids[0] == 7 and CITYSCAPES.ids[18] == 33
    assert not any(CITYSCAPES.thing[:11]) and all(CITYSCAPES.thing[11:])
    assert COCO_INSTANCE.ids[-1] == 90 and COCO_INSTANCE.synonyms == COCO_PANOPTIC.synonyms[:80]


def test_tables_ade20k_instance():
    """Row k is R = k + 1 of annotations_instance; ids are those of the 150 classes."""
    table = vocab.ADE20K_INSTANCE
    assert (table.names[0], table.names[99], table.ids[:3]) == ("bed", "flag", (7, 8, 10))
    whole = [k for k, thing in enumerate(vocab.ADE20K.thing) if thing]
    assert table.names == tuple(vocab.ADE20K.names[k] for k in whole)
    assert table.synonyms == tuple(vocab.ADE20K.synonyms[k] for k in whole)


def test_tables_shapes():
    assert SHAPES_OPEN.names[:6] == ("red disc", "red ring", "red bar", "red pole", "red cross", "green disc")
    assert SHAPES_OPEN.names[25:29] == ("gray stripes", "gray dots", "gray bricks", "brown stripes")
    assert set(SHAPES.names) < set(SHAPES_OPEN.names)
    kinds = dict(zip(SHAPES_OPEN.names, SHAPES_OPEN.thing, strict=True))
    assert [kinds[name] for name in SHAPES.names] == list(SHAPES.thing)
    assert len({name.split()[0] for name in SHAPES.names}) == len(SHAPES.names)  # hue tells the class


def test_table_rejects_a_bad_row():
    for row in ("1 thingy cat", "1 thing cat | \u732b | cat | kitten"):
        with pytest.raises(AssertionError, match="bad row"):
            vocab._table("x", row)


# ---------------------------------------------------------------- words
@by_name(ALL)
def test_words_belong_to_one_class(table):
    """Also in the plural, also where a word is another class's name in the data set's spelling."""
    owner = {}
    for k, words in enumerate(table.synonyms):
        assert words and len(set(words)) == len(words)
        for word in {vocab._key(word) for word in words}:
            assert owner.setdefault(word, k) == k, f"{word}: {table.names[k]} and {table.names[owner[word]]}"
    for k, name in enumerate(table.names):
        assert owner.get(vocab._key(vocab.clean(name)), k) == k, name


@by_name(ALL)
def test_words_are_clean(table):
    for words in table.synonyms:
        for word in words:
            # The towers strip punctuation, so there must be none.
            assert re.fullmatch(r"[a-z]+( [a-z]+)*|[\u4e00-\u9fff]+", word), word
            assert not re.search(r"\b(merged|other|stuff)\b", word), word


@by_name(TRANSLATED)
def test_words_mandarin_for_every_class(table):
    rows = vocab.MANDARIN[table.name]
    assert list(rows) == list(table.names)
    assert all(rows.values()) and len({words[0] for words in rows.values()}) == len(rows)
    for words in table.synonyms:  # English first: the first word is the one to show
        flags = [vocab.is_mandarin(word) for word in words]
        assert flags == sorted(flags) and not flags[0]


def test_words_same_thing_same_mandarin():
    """Two tables that share a class name share a Mandarin word for it, so a slip in one row shows."""
    for a, b in ((COCO_PANOPTIC, ADE20K), (COCO_PANOPTIC, CITYSCAPES), (ADE20K, CITYSCAPES)):
        rows = {words[0]: set(words) for words in a.synonyms}
        for words in b.synonyms:
            if words[0] in rows:
                assert any(vocab.is_mandarin(word) for word in rows[words[0]] & set(words)), words


def test_words_synonyms_known():
    coco = vocab.SYNONYMS["coco_panoptic"]
    assert {"mobile phone", "smartphone"} <= set(coco["cell phone"]) and "sofa" in coco["couch"]
    assert coco["tree-merged"][0] == "tree" and coco["playingfield"][0] == "playing field"
    assert coco["wall-brick"] == ("brick wall",) and coco["wall-other-merged"][0] == "wall"
    assert vocab.MANDARIN["coco_panoptic"]["cat"] == ("\u732b",)
    assert sum(len(words) > 1 for words in coco.values()) > 80


@pytest.mark.parametrize("name, word", [
    ("tree-merged", "tree"), ("sky-other-merged", "sky"), ("door-stuff", "door"), ("road, route", "road"),
    ("Traffic_Light", "traffic light"), ("t-shirt", "t shirt"), ("other", "other"), (" window ", "window")])
def test_clean_name(name, word):
    assert vocab.clean(name) == word


# ---------------------------------------------------------------- the record
@by_name(ALL)
def test_vocabulary_json_round_trip(table):
    again = Vocabulary(**json.loads(json.dumps(dataclasses.asdict(table))))
    assert again == table and hash(again) == hash(table)


def test_vocabulary_of_a_user():
    own = Vocabulary("own", ["tree-merged", "cat"], [184, 3], [False, True])
    assert own.synonyms == (("tree",), ("cat",)) and own.ids == (184, 3)
    assert vocab.prompts(own)[0][0] == ["a patch of tree", "the tree background"]
    with pytest.raises(AssertionError, match=r"own: .*\[2, 1, 2, 2\]"):
        Vocabulary("own", ["a", "b"], [1], [True, True])


# ---------------------------------------------------------------- prompts
@by_name(ALL)
@pytest.mark.parametrize("templates, count", [("default", 2), ("plain", 1), ("vild14", 14)])
def test_prompts_shape(table, templates, count):
    texts = vocab.prompts(table, templates=templates)
    assert [len(rows) for rows in texts] == [len(words) for words in vocab.SYNONYMS[table.name].values()]
    for words, rows in zip(vocab.SYNONYMS[table.name].values(), texts, strict=True):
        for word, row in zip(words, rows, strict=True):
            assert len(set(row)) == count and all(word in text and "{" not in text for text in row)


def test_prompts_thing_and_stuff():
    texts = dict(zip(COCO_PANOPTIC.names, vocab.prompts(COCO_PANOPTIC), strict=True))
    assert texts["couch"][1] == ["a photo of a sofa.", "a sofa in the scene."]
    assert texts["grass-merged"][0] == ["a patch of grass", "the grass background"]
    assert "there is a medium {} in the scene" in vocab.TEMPLATES["vild14"]
    plain = dict(zip(SHAPES.names, vocab.prompts(SHAPES, templates="plain"), strict=True))
    assert plain["red disc"] == [["a red disc"]] and plain["gray stripes"] == [["gray stripes"]]


@by_name(TRANSLATED)
def test_prompts_languages(table):
    english, mandarin = vocab.prompts(table), vocab.prompts(table, languages=("zh",))
    both = vocab.prompts(table, languages=("en", "zh"))
    assert both == [a + b for a, b in zip(english, mandarin, strict=True)]
    assert not any(vocab.is_mandarin(text) for rows in english for row in rows for text in row)
    texts = [text for rows in mandarin for row in rows for text in row]
    assert all(re.fullmatch(r"[\u4e00-\u9fff]+\u3002?", text) for text in texts)
    assert vocab.prompts(table, languages=("zh", "en"), templates="vild14")[0][-1] == both[0][-1]


def test_prompts_keep_a_class_of_another_language():
    typed = vocab.parse_prompts("\u732b, dog")
    assert [len(rows) for rows in vocab.prompts(typed)] == [1, 1]
    assert vocab.prompts(typed)[0] == vocab.prompts(typed, languages=vocab.LANGUAGES)[0]
    assert vocab.is_mandarin(vocab.prompts(typed)[0][0][0])
    assert all(vocab.prompts(SHAPES, languages=("zh",)))


def test_prompts_errors():
    assert error(vocab.prompts, COCO_PANOPTIC, ("fr",)).startswith("languages!fr: unknown language")
    assert "vild14" in error(vocab.prompts, COCO_PANOPTIC, ("en",), "vild15")


# ---------------------------------------------------------------- typed prompts
def test_parse_prompts_sections():
    typed = vocab.parse_prompts("cat, zebra|zebras; stuff: road, sky;Things: red  car")
    assert typed.names == ("cat", "zebra", "road", "sky", "red car")
    assert typed.synonyms[1] == ("zebra", "zebras") and typed.synonyms[0] == ("cat",)
    assert typed.thing == (True, True, False, False, True) and typed.ids == (1, 2, 3, 4, 5)
    assert vocab.prompts(typed)[1][1][0] == "a photo of a zebras."
    assert vocab.parse_prompts("stuff: road").thing == (False,)


def test_parse_prompts_of_one_text():
    """Data sets' own spellings come down to the same words: once a class, and no mistake of two."""
    words = vocab.parse_prompts("wall-other-merged|wall, door-stuff, door")
    assert words.names == ("wall-other-merged", "door-stuff", "door")
    assert words.synonyms == (("wall",), ("door",), ("door",))


def test_parse_prompts_hyphens():
    """The towers delete punctuation: "t-shirt" reached them as "tshirt". It is shown as typed."""
    typed = vocab.parse_prompts("T-shirt|tee_shirt, red-pole; stuff: X-ray  film")
    assert typed.names == ("T-shirt", "red-pole", "X-ray film")
    assert typed.synonyms == (("t shirt", "tee shirt"), ("red pole",), ("x ray film",))
    assert error(vocab.parse_prompts, "t-shirt, T-Shirt").startswith("prompts!T-Shirt: named twice")
    assert "empty prompt" in error(vocab.parse_prompts, "cat, -")


def test_parse_prompts_mandarin_punctuation():
    full = "cat\uff0c\u6591\u9a6c\uff5czebra\uff1bstuff\uff1aroad\u3001\u5929\u7a7a"
    half = "cat, \u6591\u9a6c|zebra; stuff: road, \u5929\u7a7a"
    assert vocab.parse_prompts(full) == vocab.parse_prompts(half)


@pytest.mark.parametrize("text, said", [
    ("", "empty prompt"), ("cat,,dog", "empty prompt"), ("cat|", "empty prompt"),
    ("cat; stuff:", "empty prompt"), ("cat;", "empty prompt"), ("cat, Cat", "!Cat: named twice"),
    ("cat, dog|cat", "!cat: named twice"),
    ("zebra|zebra", "!zebra: named twice"), ("cat; stuf: road", "!stuf: unknown section"),
    (": cat", "!:: unknown section"), ("cat; stuff: a: b", "unknown section")])
def test_parse_prompts_errors(text, said):
    message = error(vocab.parse_prompts, text, "--prompts")
    assert message.startswith("--prompts!") and said in message


# ---------------------------------------------------------------- splits
@pytest.mark.parametrize("name, seen_count", [
    ("ovp_val", 96), ("padding_119_14", 119), ("ovcoco_48_17", 101)])  # 101 = 48 things + 53 stuff
def test_split_coco(name, seen_count):
    seen, unseen = vocab.split(COCO_PANOPTIC, name)
    assert [COCO_PANOPTIC.ids[k] for k in unseen] == COCO_UNSEEN[name]
    assert len(seen) == seen_count and not set(seen) & set(unseen)
    assert list(seen) == sorted(seen) and set(seen + unseen) <= set(range(133))
    few_seen, few = vocab.split(COCO_INSTANCE, name)  # the things of the same split
    assert few == tuple(k for k in unseen if k < 80) and few_seen == tuple(k for k in seen if k < 80)


def test_split_ovcoco_leaves_15_things_out():
    seen, unseen = vocab.split(COCO_INSTANCE, "ovcoco_48_17")
    rest = {name for k, name in enumerate(COCO_INSTANCE.names) if k not in seen + unseen}
    assert (len(seen), len(unseen), len(rest)) == (48, 17, 15)
    # The split kept the classes that are one word of its word vectors.
    assert all(" " in name for name in rest) and not any(" " in COCO_INSTANCE.names[k] for k in seen + unseen)


def test_split_without_a_name():
    assert vocab.split(COCO_INSTANCE, "") == (tuple(range(80)), ())


def test_split_true_ids(truth):
    assert truth["splits_unseen_coco_ids"] == COCO_UNSEEN


def test_split_shapes():
    seen, unseen = vocab.split(SHAPES_OPEN, "shapes")
    assert {SHAPES_OPEN.names[k] for k in unseen} == {
        "red ring", "green disc", "blue cross", "yellow bar", "white pole", "blue disc",
        "brown dots", "teal stripes"}
    assert len(seen) == 26
    parts = {word for k in seen for word in SHAPES_OPEN.names[k].split()}
    # Only the combinations are new.
    assert parts == {word for name in SHAPES_OPEN.names for word in name.split()}


def test_splits_name_existing_classes():
    for made_for, *lists in vocab.SPLITS.values():
        names = vocab.VOCABULARIES[made_for[0]].names
        for listed in lists:
            words = [word.strip() for word in listed.split(",") if word.strip()]
            assert set(words) <= set(names) and len(set(words)) == len(words)


def test_split_file_round_trip(tmp_path):
    seen, unseen = vocab.split(COCO_PANOPTIC, "ovp_val")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([COCO_PANOPTIC.names[k] for k in unseen]))
    assert vocab.split(COCO_PANOPTIC, str(path)) == vocab.split(COCO_PANOPTIC, path) == (seen, unseen)
    path.write_text(json.dumps({"unseen": ["Sofa", "\u732b"], "seen": ["tree", "person"]}))
    seen, unseen = vocab.split(COCO_PANOPTIC, path)
    assert [COCO_PANOPTIC.names[k] for k in unseen] == ["cat", "couch"]
    assert [COCO_PANOPTIC.names[k] for k in seen] == ["person", "tree-merged"]


@pytest.mark.parametrize("data, said", [
    ('["zebraa"]', "mine.json!zebraa: unknown class of coco_panoptic; did you mean zebra?"),
    ('["qqqqqq"]', "python vocab.py coco_panoptic"), ("[cat]", "not JSON"), ('"cat"', "not a split"),
    ('{"seen": ["cat"]}', "not a split"), ('{"unseen": "cat"}', "not a split"), ("[17]", "not a split"),
    ("5", "not a split"),
    ('{"unseen": ["cat"], "sen": []}', "not a split"), ("[]", "no unseen class"),
    ('{"unseen": ["cat"], "seen": []}', "no seen class"),
    ('{"unseen": ["cat"], "seen": ["kitten"]}', "mine.json!cat: both seen and unseen")])
def test_split_file_errors(tmp_path, data, said):
    path = tmp_path / "mine.json"
    path.write_text(data)
    message = error(vocab.split, COCO_PANOPTIC, str(path))
    assert said in message and message.startswith(str(path))


def test_split_name_errors():
    assert "did you mean ovp_val?" in error(vocab.split, COCO_PANOPTIC, "ovp_vall")
    assert "no such file" in error(vocab.split, COCO_PANOPTIC, "/nowhere/mine.json")
    assert error(vocab.split, ADE20K, "ovp_val").startswith("ovp_val!ade20k: made for coco_panoptic")
    assert "shapes_open" in error(vocab.split, SHAPES, "shapes")


# ---------------------------------------------------------------- class lists
def test_class_list():
    words = vocab.parse_classes(" sky\r\nlong grass\n\n")
    assert words == vocab.Vocabulary("own", ("sky", "long grass"), (0, 1), (False, False))
    assert len(vocab.parse_classes("\n".join(map(str, range(254)))).names) == 254


@pytest.mark.parametrize("text, said", [
    ("", "0 names; give 1 to 254"), ("\n".join(map(str, range(255))), "255 names"),
    ("\nsky", "line 1 is blank"), ("sky\n\nroad", "line 2 is blank"),
    ("sky\nroad\nsky", "line 3 is a name again"),
    (b"stra\xdfe\nsky".decode(errors="replace"), "not UTF-8; save it as UTF-8"),
    ("sky\nroad".encode("utf-16").decode(errors="replace"), "not UTF-8"),
    ("sky\nroad".encode("utf-16-le").decode(), "not UTF-8")])
def test_class_list_errors(text, said):
    assert error(vocab.parse_classes, text, "x!classes.txt").startswith(f"x!classes.txt: {said}")


# ---------------------------------------------------------------- words in common
def test_overlap_coco_to_ade():
    seen, unseen = vocab.overlap(COCO_PANOPTIC, ADE20K)
    assert sorted(seen + unseen) == list(range(150))
    known, new = ({ADE20K.names[k] for k in part} for part in (seen, unseen))
    assert {"wall", "sofa", "plane", "rug", "minibike, motorbike", "traffic light", "rock, stone"} <= known
    assert {"chandelier", "radiator", "palm, palm tree", "flag", "fountain", "pool", "screen"} <= new


def test_overlap_depends_on_what_was_seen():
    seen, _ = vocab.split(COCO_PANOPTIC, "ovp_val")
    sofa, bed = ADE20K.names.index("sofa"), ADE20K.names.index("bed")
    assert sofa in vocab.overlap(COCO_PANOPTIC, ADE20K)[0]
    known, new = vocab.overlap(COCO_PANOPTIC, ADE20K, seen)
    assert sofa in new and bed in known
    assert vocab.overlap(COCO_PANOPTIC, ADE20K, ()) == ((), tuple(range(150)))
    names = {CITYSCAPES.names[k] for k in vocab.overlap(COCO_PANOPTIC, CITYSCAPES)[1]}
    assert names == {"pole", "traffic sign", "rider"}
    assert vocab.overlap(COCO_PANOPTIC, COCO_PANOPTIC, seen)[0] == seen  # no class borrows a word


@pytest.mark.parametrize("a, b", [
    ("zebras", "zebra"), ("Boxes", "box"), ("glasses", "glass"), ("benches", "bench"), ("bus", "Bus"),
    ("hot-dogs", "hot dog"), ("leather couches", "leather couch"), ("houses", "house"), ("vases", "vase"),
    ("horses", "horse"), ("buses", "bus"), ("lenses", "lens"), ("scissors", "scissors"), ("gloves", "glove"),
    ("ties", "tie"), ("axes", "axe"), ("canvases", "canvas"), ("stoves", "stove"), ("leaves", "leaf"),
    ("shoes", "shoe"), ("snowmen", "snowman"), ("computer mice", "computer mouse"), ("movies", "movie")])
def test_key_same(a, b):
    assert vocab._key(a) == vocab._key(b)


@pytest.mark.parametrize("a, b", [("bus", "bu"), ("glass", "glas"), ("car", "cart"), ("dog", "hot dog"),
                                  ("hose", "hoe"), ("tube", "tub"), ("plane", "plan"), ("vase", "van"),
                                  ("tie", "tray"), ("men", "women"), ("house", "horse"), ("cape", "cap")])
def test_key_different(a, b):
    assert vocab._key(a) != vocab._key(b)


# ---------------------------------------------------------------- background
def dropped(text, name="coco", table=COCO_PANOPTIC):
    kept = vocab.background(name, vocab.parse_prompts(text))
    rows = dict(zip(table.names, zip(table.ids, table.thing, table.synonyms, strict=True), strict=True))
    for row in zip(kept.names, kept.ids, kept.thing, kept.synonyms, strict=True):
        assert rows[row[0]] == row[1:]
    return set(table.names) - set(kept.names)


@pytest.mark.parametrize("text, gone", [
    ("unicorn", set()), ("zebras", {"zebra"}), ("red car", {"car"}), ("sofa", {"couch"}), ("\u732b", {"cat"}),
    ("\u7ea2\u8272\u6c7d\u8f66", {"car"}),  # "red car": Mandarin compounds carry no space
    ("stuff: wall", {"wall-brick", "wall-stone", "wall-tile", "wall-wood", "wall-other-merged"}),
    ("unicorn|television", {"tv"}), ("carp, mousetrap", set())])
def test_background_drops_what_matches(text, gone):
    assert dropped(text) == gone


@pytest.mark.parametrize("text, gone", [
    ("buses", "bus"), ("minibuses", "bus"), ("knives", "knife"), ("mice", "mouse"), ("puppies", "dog"),
    ("ponies", "horse"), ("geese", "bird"), ("lorries", "truck"), ("women", "person"), ("men", "person"),
    ("children", "person"), ("oxen", "cow"), ("berry", "fruit"), ("houses", "house"), ("vases", "vase"),
    ("horses", "horse"), ("wine glasses", "wine glass"), ("scissors", "scissors"), ("mouse", "mouse"),
    ("toothbrushes", "toothbrush"), ("benches", "bench"), ("shelves", "shelf"), ("loaf", None)])
def test_background_drops_a_class_by_its_plural(text, gone):
    """It stayed as a distractor, and won the masks of its own plural."""
    assert dropped(text) == ({gone} if gone else set())


def test_background_names():
    typed = vocab.parse_prompts("cat, toilet")
    assert vocab.background("none", typed).names == ()
    assert vocab.prompts(vocab.background("none", typed)) == []
    gone = dropped("cat, toilet", "ade", ADE20K)
    assert {name.split(",")[0] for name in gone} == {"toilet", "animal"}


def test_background_file(tmp_path):
    typed = vocab.parse_prompts("red cars")
    path = tmp_path / "words.txt"
    path.write_text("# street\ncar|automobile, lamp post  # poles\n\nstuff: hedge\n", encoding="utf-8")
    kept = vocab.background(str(path), typed)
    assert kept.names == ("lamp post", "hedge") and kept.thing == (True, False)
    path.write_text("hedge,,\n")
    assert error(vocab.background, str(path), typed).startswith(f"{path}!hedge,,: empty prompt")
    assert "coco, ade, none" in error(vocab.background, "cooc", typed)


def test_files_of_windows_editors(tmp_path):
    """A byte order mark is no part of the first word; another encoding is named with its file."""
    typed, path = vocab.parse_prompts("red cars"), tmp_path / "words.txt"
    path.write_text("hedge, \u8def", encoding="utf-8-sig")
    assert vocab.background(str(path), typed).names == ("hedge", "\u8def")
    for encoding in ("latin-1", "utf-16"):
        path.write_text("stra\u00dfe", encoding=encoding)
        assert error(vocab.background, str(path), typed) == f"{path}: not UTF-8; save it as UTF-8"
    path.write_text('["bus"]', encoding="utf-8-sig")
    assert vocab.split(COCO_PANOPTIC, str(path))[1] == (COCO_PANOPTIC.names.index("bus"),)


# ---------------------------------------------------------------- command line
def test_main_prints_tables():
    script = Path(vocab.__file__)

    def run(*args):
        command = [sys.executable, "-X", "utf8", script, *args]
        return subprocess.run(command, capture_output=True, encoding="utf-8")

    everything, one = run().stdout, run("cityscapes").stdout
    assert all(f"{v.name}: {len(v.names)} classes" in everything for v in ALL) and one in everything
    assert len(one.splitlines()) == 20 and "33 thing bicycle | bicycle, bike, \u81ea\u884c\u8f66" in one
    assert run("citscapes").returncode != 0
