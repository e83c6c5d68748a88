"""Every kind of thing that can be wrong with raw data: why it matters and what to do about it.

This one table is what the terminal, the JSON, the HTML page and the documentation say.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        name: As it stands in JSON and lists.
        is_unusable: Whether a pair (or row) with it cannot go into a shard; else it is noted and the pair is used.
        consequence: Why it matters, in a sentence.
        remedy: What to do, in a sentence.
    """

    name: str
    is_unusable: bool
    consequence: str
    remedy: str


def _kind(name: str, consequence: str, remedy: str, *, is_unusable: bool = False) -> Kind:
    return Kind(name, is_unusable, consequence, remedy)


def _unusable(name: str, consequence: str, remedy: str) -> Kind:
    return _kind(name, consequence, remedy, is_unusable=True)


_FETCH = "Copy or download the file again; several in a row mean an archive that was not unpacked to its end."

_KINDS = (
    _unusable(
        "missing_ground",
        "The list names a panorama that is not there: recall on fewer queries cannot be compared with published ones.",
        _FETCH,
    ),
    _unusable(
        "missing_aerial",
        "The list names an aerial image that is not there: among fewer references retrieval is easier than published.",
        _FETCH,
    ),
    _unusable("empty_file", "The file has zero bytes: a download or a copy broke off at once.", _FETCH),
    _unusable(
        "truncated",
        "The image ends too early: many decoders fill the rest with grey and train on it without a word.",
        _FETCH,
    ),
    _unusable(
        "unreadable",
        "The file is damaged, or neither JPEG nor PNG (often an error page under an image's name): it has no pixels.",
        "Open it to see what it is, then copy or download it again.",
    ),
    _unusable(
        "too_large",
        "The header claims more than 200 million pixels: decoding it could take all memory, so it is never tried.",
        "Find out where the file comes from; if it is a real picture, store it smaller.",
    ),
    _unusable(
        "duplicate_key",
        "One id is listed with different files or in two splits: nobody knows which is meant, and it may leak.",
        "Give each pair its own id, or remove the rows that are wrong.",
    ),
    _unusable(
        "bad_key",
        "The id cannot name a file within a shard: it is empty, too long, not UTF-8, or has a dot, a slash or a blank.",
        "Give the pair a plain id: letters, digits, dashes and underscores.",
    ),
    _unusable(
        "bad_row",
        "The row lacks a value, or its split cannot name a shard: nobody knows which pair it means.",
        "Mend or remove the line in the list.",
    ),
    _kind(
        "no_location",
        "Distances leave this pair out: no mask of near negatives, no recall within metres, no leak found by place.",
        "Add the list of locations beside the dataset if you have it; training works without.",
    ),
    _kind(
        "not_jpeg",
        "The file is a PNG under a JPEG's name: its bytes are kept, and decoding it is several times slower.",
        "Nothing must be done; store it as a JPEG if loading turns out slow.",
    ),
    _kind("greyscale", "It has one channel and becomes RGB with three equal ones.", "Look whether it should be."),
    _kind(
        "cmyk",
        "The image is CMYK, as for print: it becomes RGB without a colour profile, so its colours are approximate.",
        "Store it as RGB if its colours matter.",
    ),
    _kind(
        "odd_size",
        "The size is not the dataset's usual one: it is resized like the others, so its proportions change.",
        "Look at a few: a crop, a preview or another image may stand in its place.",
    ),
    _kind(
        "exif_rotated",
        "The file asks viewers to turn it (EXIF); decoders here do not, so the network sees it as it is stored.",
        "Turn the pixels themselves (`jpegtran`, `exiftran -a`) if the picture is to be upright.",
    ),
    _kind("duplicate_row", "The same row is listed more than once: it is used once.", "Nothing must be done."),
    _kind(
        "non_utf8_name",
        "The file's name is not UTF-8: it is read all the same, but other systems may not find it.",
        "Rename the file and its entry in the list.",
    ),
    _kind(
        "unknown_column",
        "Nothing reads this column: a misspelt `latitude` or `split` would be lost like this.",
        "Correct the name, or leave the column if it is yours.",
    ),
    _kind(
        "absent_split",
        "The dataset has this split and this folder has not: nothing can be trained or measured on it.",
        "Fetch the list and the images that belong to it if you need it.",
    ),
    _kind(
        "unlisted_file",
        "No list names this image: it is not used, as negative or otherwise.",
        "Nothing must be done, unless the list is an older one.",
    ),
    _kind(
        "second_file",
        "Two files stand for one id, and only the first is used: they may be different pictures.",
        "Remove the one that is not meant.",
    ),
    _kind(
        "other_suffix",
        "The list names the file with another suffix (`.jpg` for `.JPG` or `.png`): the one that is there is used.",
        "Nothing must be done.",
    ),
    _kind(
        "reference_only",
        "No panorama is paired with this aerial image: it is left out, which makes retrieval easier than published.",
        "Name the protocol when you report recall.",
    ),
    _kind(
        "duplicate_ground_bytes",
        "Two pairs of a split have the very same panorama: as query it cannot be told from its twin.",
        "Keep one of them, or know that recall@1 has a ceiling.",
    ),
    _kind(
        "duplicate_aerial_bytes",
        "Two pairs of a split have the very same aerial image: as references they tie, and ties count as failures.",
        "Keep one of them, or know that recall@1 has a ceiling.",
    ),
    _kind(
        "duplicate_position_and_heading",
        "Two pairs of a split were taken at the same place in the same direction: as queries they are near twins.",
        "Keep one of them, or know that recall@1 has a ceiling.",
    ),
    _kind(
        "leak_ground_bytes",
        "The panorama stands in the training split too: its answer can be remembered, so recall is flattered.",
        "Report recall on the de-leaked queries as well (`evaluate` does), or exclude them (`--fix-leaks`).",
    ),
    _kind(
        "leak_aerial_bytes",
        "The aerial image stands in the training split too: its answer can be remembered, so recall is flattered.",
        "Report recall on the de-leaked queries as well (`evaluate` does), or exclude them (`--fix-leaks`).",
    ),
    _kind(
        "leak_position_and_heading",
        "A training pair was taken at the same place in the same direction: its answer can be remembered.",
        "Report recall on the de-leaked queries as well (`evaluate` does), or exclude them (`--fix-leaks`).",
    ),
    _kind(
        "excluded_by_list",
        "The exclusion list given to `shard` names the pair: it is left out, and the manifest says so.",
        "Nothing; take it off the list to have it back.",
    ),
)

KINDS = {kind.name: kind for kind in _KINDS}
UNUSABLE_KINDS = frozenset(kind.name for kind in _KINDS if kind.is_unusable)
NOTED_KINDS = frozenset(kind.name for kind in _KINDS if not kind.is_unusable)
