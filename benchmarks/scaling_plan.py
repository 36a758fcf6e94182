"""From the measured constants to disks, memory and machines: the tables of docs/scaling.md, each a marked block."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from scaling_fit import duration, three_digits

SCALES = (10**6, 10**8, 10**10)
DAY_S = 86400
# Assumed, and called so on the page.
DISK_BYTES_PER_S = 1e9
RANDOM_READS_PER_S = 1e5
SERVER_BYTES = 256e9
GPU_IMAGES_PER_S = 10_000
REDUCED_DIM = 128
CODE_BYTES = 64
HNSW_LINKS = 32
CANDIDATES = (100, 1_000, 10_000)

_BLOCK = re.compile(r"(<!-- computed: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def blocks_of(figures: dict[str, Any]) -> dict[str, str]:
    """Name of the block -> its Markdown."""
    measured, c = figures["measured"], figures["constants"]
    return {
        "constants": constants(measured, c),
        "laws": laws(figures["series"]),
        "embedding": embedding(measured, c),
        "storage": storage(c),
        "pairs": pairs(c),
        "identify": identify(c),
        "limits": limits(c),
        "candidates": candidates(c),
        "training": training(c),
    }


def with_blocks(page: str, blocks: dict[str, str]) -> str:
    return _BLOCK.sub(lambda found: f"{found[1]}{blocks.get(found[2], '')}\n{found[3]}", page)


def differing(page: str, blocks: dict[str, str]) -> list[str]:
    """Names of blocks that the page shows otherwise, lacks, or has too many of."""
    found = {match[2]: match[0] for match in _BLOCK.finditer(page)}
    expected = {name: f"<!-- computed: {name} -->\n{text}\n<!-- end -->" for name, text in blocks.items()}
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def constants(measured: dict[str, Any], c: dict[str, float]) -> str:
    side, dim = int(c["picture_side"]), int(c["embedding_dim"])
    versions = ", ".join(
        f"{name} {measured[key]}"
        for name, key in (("Python", "python"), ("ONNX Runtime", "onnxruntime"), ("PyTorch", "torch"))
    )
    trial = " **A trial run with few sizes; figures to be measured again.**" if measured["quick"] else ""
    rows = [
        ("process start until the bundle has answered once", duration(c["start_s"])),
        ("backbone, a picture, all cores, best batch", ms(c["backbone_ms_per_image"])),
        ("backbone, one picture alone", ms(c["one_image_ms"])),
        ("embedding a small PNG (96 px), everything", ms(c["embed_ms_per_image"])),
        ("the same with a network for 32 px", ms(c["embed_32px_ms_per_image"])),
        (f"reading, decoding and resizing a JPEG of {side} x {side} pixels, one core", ms(c["decode_ms_per_image"])),
        ("size of that file", size(c["picture_bytes"])),
        (f"scoring a pair of embeddings of {dim:,} numbers", us(c["us_per_pair"])),
        ("`identify`, a row", us(c["us_per_row"])),
        ("first question of a process, a row", us(c["first_us_per_row"])),
        ("gallery on the disk, a row", f"{c['row_bytes_disk']:,.0f} B"),
        (
            "memory that grows: `identify`, a row",
            f"{c['memory_bytes_per_row']:,.0f} B" if c["memory_bytes_per_row"] else "none seen",
        ),
        ("memory that grows: embedding, a picture", f"{c['memory_bytes_per_image']:,.0f} B"),
        ("memory that grows: scoring a list of pairs, a pair", f"{c['memory_bytes_per_pair']:,.0f} B"),
        ("embedding cache on the disk, a picture", f"{c['cache_bytes_per_image']:,.0f} B"),
        ("look-up there, a picture", us(c["cache_us_per_image"])),
        ("training step, a picture, backbone forward and backward", ms(c["train_ms_per_image"])),
    ]
    about = f"{measured['cpu']}, {measured['cores']} cores, no GPU used; {versions}; {measured['date']}."
    return f"{about}{trial}\n\n" + table(("measured", "cost"), rows)


def laws(series: Sequence[dict[str, Any]]) -> str:
    rows = []
    for one in series:
        fit, sizes = one["fit"], one["sizes"]
        memory = one["unit"] == "MiB"
        growth = one["costs"][-1] - one["costs"][0]
        if fit:
            law = f"{fit['exponent']:.3f} +- {fit['error']:.3f}, from {fit['first']:,.0f} on"
            each = f"{fit['slope'] * 2**20:,.0f} B" if memory else duration(fit["slope"])
        elif memory:
            law, each = f"none: grows by {growth:,.0f} MiB in all", ""
        else:
            speedup = ", ".join(
                f"{one['costs'][0] / cost:.2f} at {number:g}"
                for number, cost in zip(sizes[1:], one["costs"][1:], strict=True)
            )
            law, each = f"times faster than on one: {speedup}", ""
        rows.append((one["title"], f"{sizes[0]:,} to {sizes[-1]:,}", law, each))
    return table(("what, against what", "sizes", "exponent", "each more"), rows)


def embedding(measured: dict[str, Any], c: dict[str, float]) -> str:
    cores = measured["cores"]
    each_s = (c["backbone_ms_per_image"] + c["decode_ms_per_image"] / cores) / 1e3
    side = int(c["picture_side"])
    rows = [
        ("one machine like this one", [duration(n * each_s) for n in SCALES]),
        ("such machines for one day", [count(n * each_s / DAY_S) for n in SCALES]),
        (f"machines of {GPU_IMAGES_PER_S:,} pictures/s (assumed) for one day", [
            count(n / GPU_IMAGES_PER_S / DAY_S) for n in SCALES
        ]),
        ("cores that decode for each of those", [
            count(GPU_IMAGES_PER_S * c["decode_ms_per_image"] / 1e3)
        ] * len(SCALES)),
        (f"pictures on the disk (JPEG, {side} px)", [size(n * c["picture_bytes"]) for n in SCALES]),
        ("reading them within a day", [f"{size(n * c['picture_bytes'] / DAY_S)}/s" for n in SCALES]),
        ("all of them known to the cache, one process", [duration(n * c["cache_us_per_image"] / 1e6) for n in SCALES]),
    ]  # fmt: skip
    first = (
        f"A picture: {ms(c['backbone_ms_per_image'])} of both the cores for the backbone and "
        f"{ms(c['decode_ms_per_image'])} of one core for the file, {ms(each_s * 1e3)} together."
        if cores == 2
        else f"A picture: {ms(c['backbone_ms_per_image'])} of all {cores} cores for the backbone and "
        f"{ms(c['decode_ms_per_image'])} of one core for the file, {ms(each_s * 1e3)} together."
    )
    return first + "\n\n" + scales_table("computed", rows)


def storage(c: dict[str, float]) -> str:
    dim = int(c["embedding_dim"])
    hnsw = dim * 4 + HNSW_LINKS * 2 * 4
    kinds = [
        (f"float32, {dim:,} numbers", dim * 4),
        (f"float16, {dim:,} numbers", dim * 2),
        (f"float32, reduced to {REDUCED_DIM} by PCA", REDUCED_DIM * 4),
        (f"float16, reduced to {REDUCED_DIM} by PCA", REDUCED_DIM * 2),
        (f"product-quantised codes of {CODE_BYTES} bytes", CODE_BYTES),
        (f"HNSW graph of {HNSW_LINKS} links with its float32 vectors", hnsw),
    ]
    rows = [(f"{name}: {each:,} B", [size(n * each) for n in SCALES]) for name, each in kinds]
    rows += [
        (f"gallery folder: {c['row_bytes_disk']:,.0f} B", [size(n * c["row_bytes_disk"]) for n in SCALES]),
        (f"embedding cache: {c['cache_bytes_per_image']:,.0f} B", [
            size(n * c["cache_bytes_per_image"]) for n in SCALES
        ]),
    ]  # fmt: skip
    if c["memory_bytes_per_row"]:
        name = f"memory of a process that identifies: {c['memory_bytes_per_row']:,.0f} B and the start"
        rows.append((name, [size(n * c["memory_bytes_per_row"]) for n in SCALES]))
    for name, each in (kinds[0], kinds[3], kinds[4], kinds[5]):
        machines = [count(n * each / SERVER_BYTES) for n in SCALES]
        rows.append((f"machines of {size(SERVER_BYTES)} (assumed) that hold in memory: {name}", machines))
    return scales_table("computed", rows)


def pairs(c: dict[str, float]) -> str:
    each_s = c["us_per_pair"] / 1e6
    numbers = [n * (n - 1) // 2 for n in SCALES]
    rows = [
        ("pairs", [scientific(p) for p in numbers]),
        ("one machine like this one", [duration(p * each_s) for p in numbers]),
        ("such machines for one day", [count(p * each_s / DAY_S) for p in numbers]),
        ("scores alone, 4 B each", [size(p * 4) for p in numbers]),
        ("a list of 100 pairs a picture instead: one machine", [duration(100 * n * each_s) for n in SCALES]),
        ("memory of that list", [size(100 * n * c["memory_bytes_per_pair"]) for n in SCALES]),
    ]
    return scales_table("computed", rows) + "\n\n" + f"""All pairs within a day: up to {
        count(largest(DAY_S / each_s), down=True)} pictures on one machine like this one, {
        count(largest(1000 * DAY_S / each_s), down=True)} on a thousand; within 30 days {
        count(largest(30 * DAY_S / each_s), down=True)} and {
        count(largest(30_000 * DAY_S / each_s), down=True)}."""  # fmt: skip


def identify(c: dict[str, float]) -> str:
    rows = []
    for n in (10**4, 10**5, *SCALES):
        answer = n * c["us_per_row"] / 1e6
        vectors = n * c["embedding_dim"] * 4
        rows.append(
            (
                scientific(n),
                duration(answer),
                duration(max(answer, vectors / DISK_BYTES_PER_S)),
                duration(n * c["first_us_per_row"] / 1e6),
                size(vectors),
                count(answer),
            )
        )
    header = (
        "rows", "a question", f"vectors from a disk of {size(DISK_BYTES_PER_S)}/s (assumed)",
        "first question of a process", "vectors", "machines that answer together within 1 s",
    )  # fmt: skip
    return table(header, rows)


def limits(c: dict[str, float]) -> str:
    per_s = 1e6 / c["us_per_row"]
    parts = [
        f"within {name} up to {count(per_s * s, down=True)} rows"
        for name, s in (("0.1 s", 0.1), ("1 s", 1), ("10 s", 10))
    ]
    return f"Exact `identify` on one machine like this one answers {', '.join(parts)}."


def candidates(c: dict[str, float]) -> str:
    rows = []
    for number in CANDIDATES:
        score = number * c["us_per_pair"] / 1e6
        read = number / RANDOM_READS_PER_S
        rows.append(
            (
                f"{number:,}",
                ms(c["one_image_ms"]),
                duration(read),
                duration(score),
                ms(c["one_image_ms"] + (read + score) * 1e3),
            )
        )
    header = (
        "candidates", "embed the question",
        f"read their vectors, {RANDOM_READS_PER_S:,.0f} random reads/s (assumed)", "score them exactly",
        "sum, index not counted",
    )  # fmt: skip
    return table(header, rows)


def training(c: dict[str, float]) -> str:
    each_s = c["train_ms_per_image"] / 1e3
    ratio = c["train_ms_per_image"] / c["backbone_ms_per_image"]
    gpu = GPU_IMAGES_PER_S / 3
    rows = [
        ("one pass on one machine like this one", [duration(n * each_s) for n in SCALES]),
        ("such machines for a pass a day", [count(n * each_s / DAY_S) for n in SCALES]),
        (f"machines of {three_digits(gpu)} training pictures/s (assumed) for a pass a day", [
            count(n / gpu / DAY_S) for n in SCALES
        ]),
        ("for 20 passes in 30 days", [count(20 * n / gpu / DAY_S / 30) for n in SCALES]),
        ("pictures to read a second for a pass a day", [count(n / DAY_S) for n in SCALES]),
    ]  # fmt: skip
    return (
        f"Measured: a training step costs {ratio:.1f} times the backbone of the deploy runtime a picture.\n\n"
        + scales_table("computed", rows)
    )


def largest(number_of_pairs: float) -> float:
    """Pictures whose pairs are so many."""
    return (1 + math.sqrt(1 + 8 * number_of_pairs)) / 2


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def scales_table(first: str, rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    return table((first, *(f"{scientific(n)} pictures" for n in SCALES)), [(name, *values) for name, values in rows])


def count(number: float, *, down: bool = False) -> str:
    """Whole things, two digits of them: more machines than needed, or fewer pictures than would be too many."""
    number = math.floor(number) if down else math.ceil(number - 1e-9)
    if number < 100:
        return f"{number}"
    step = 10 ** (len(str(number)) - 2)
    rounded = number // step * step if down else -(-number // step) * step
    return f"{rounded:,}" if rounded < 10**7 else scientific(rounded)


def scientific(number: float) -> str:
    if number < 10**4:
        return f"{number:,.0f}"
    mantissa, exponent = f"{number:.1e}".split("e")
    times = "" if mantissa == "1.0" else f"{mantissa.removesuffix('.0')} x "
    return f"{times}10^{int(exponent)}"


def size(number_of_bytes: float) -> str:
    for unit, value in (("EB", 1e18), ("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_of_bytes >= value:
            # Without a scientific form: beyond 1,000 EB nobody buys.
            number = number_of_bytes / value
            return f"{scientific(number) if number >= 10**4 else three_digits(number)} {unit}"
    return f"{number_of_bytes:.0f} B"


def ms(milliseconds: float) -> str:
    return duration(milliseconds / 1e3)


def us(microseconds: float) -> str:
    return duration(microseconds / 1e6)
