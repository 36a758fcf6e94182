"""Text files that others may have made or damaged: pair lists, earlier results to compare with, keys."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from fuzz.driver import Target
from fuzz.mutations import json_bytes, mutated, mutated_json
from PIL import Image
from tiny_bundle import make_bundle

import siamese_deploy.bench.regression
import siamese_deploy.comparison
import siamese_deploy.pair_list
import siamese_deploy.signature
from siamese_deploy.bench.machine import describe_machine
from siamese_deploy.bench.regression import compare_with, read_baseline, refuse_other_run
from siamese_deploy.bench.run import Row, Settings
from siamese_deploy.bench.tables import bench_content, bench_json
from siamese_deploy.bench.timing import Window
from siamese_deploy.cli.eval import main as eval_command
from siamese_deploy.comparison import compare, read_earlier
from siamese_deploy.errors import SiameseError
from siamese_deploy.evaluate import evaluate_pairs, resample
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.pair_list import read_pair_list
from siamese_deploy.pairs import every_pair
from siamese_deploy.runtime import OnnxVerifier
from siamese_deploy.signature import SigningKey, VerifyKey


def _pictures(root: Path) -> list[str]:
    """Four people with three pictures each, named as LFW names them."""
    paths = [f"{name}/{name}_{k:04d}.png" for name in ("Ann_Lee", "Bo", "C", "D\u00e9") for k in (1, 2, 3)]
    random = np.random.RandomState(0)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(root / path)
    return paths


class PairLists(Target):
    """A list gives pairs of pictures that are there, never of one with itself, or an error of ours with its line."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder / "pictures", folder
        self.paths = _pictures(self.root)
        p = self.paths
        rows = [(p[0], p[1], 1), (p[0], p[3], 0), (p[4], p[5], "same"), (p[6], p[9], "no"), (f"./{p[7]}", p[8], "TRUE")]
        plain = "\n".join(["left,right,label", *(",".join(map(str, row)) for row in rows)])
        other = "\r\n".join(['\ufeff"is_same",score,left,right', *(f'{n},0.5,"{a}","{b}"' for a, b, n in rows)])
        lfw = "2\t1\nBo\t1\t2\nBo\t3\tC\t1\nAnn_Lee\t1\t3\nC\t2\tBo\t2\n"
        short_lfw = "1\nC\t1\t2\nAnn_Lee\t1\tC\t3\n"
        self.lists = {".csv": [plain.encode(), other.encode()], ".txt": [lfw.encode(), short_lfw.encode()]}

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        kind = (".csv", ".txt")[number % 2]
        data = self.lists[kind][random.randint(2)]
        if random.randint(2):
            data = mutated(random, data, [*self.lists[".csv"], *self.lists[".txt"]])
        else:  # a field, a row or the header at a time
            lines = data.split(b"\n")
            for _ in range(random.randint(1, 3)):
                k = random.randint(len(lines))
                separator = b"," if kind == ".csv" else b"\t"
                fields = lines[k].split(separator)
                new = (b"", b"..", b"/etc/passwd", b"0", b"1", b"-1", b"9" * 30, b'"', b"\xff", b"\0", b"a" * 70_000,
                       b"left", fields[0], fields[-1], "\uff11".encode(), b"Bo", self.paths[0].encode())  # fmt: skip
                fields[random.randint(len(fields))] = new[random.randint(len(new))]
                lines[k] = separator.join(fields)
                if random.randint(3) == 0:
                    lines.insert(random.randint(len(lines)), lines[random.randint(len(lines))])
            data = b"\n".join(lines)
        return kind.encode() + b"\0" + data

    def check(self, data: bytes) -> str:
        kind, _, content = data.partition(b"\0")
        file = self.folder / f"list{kind.decode()}"
        file.write_bytes(content)
        try:
            folder, pairs = read_pair_list(file, self.root)
        except SiameseError as error:
            return f"{type(error).__name__}{'' if str(file) in str(error) else ' without its file'}"
        assert set(folder.paths) <= set(self.paths)
        assert 0 < len(pairs) <= content.count(b"\n") + content.count(b"\r")
        assert (pairs.left != pairs.right).all()
        return "read"

    def sabotage(self) -> None:
        """A picture may be paired with itself."""
        add = siamese_deploy.pair_list._ListedPairs.add

        def lax(listed: Any, line: int, left: int, right: int, *rest: Any, **named: Any) -> None:
            add(listed, line, left, right + len(listed.pictures) * (left == right), *rest, **named)
            listed.right[-1] = right

        siamese_deploy.pair_list._ListedPairs.add = lax


class Results(Target):
    """metrics.json and pairs.csv of an earlier evaluation: an error of ours, or a comparison of real numbers."""

    memory_mib = 1024

    def __init__(self, folder: Path) -> None:
        bundle, root, self.results = folder / "bundle", folder / "pictures", folder / "results"
        make_bundle().write(bundle)
        _pictures(root)
        verifier = OnnxVerifier(bundle, provider="cpu")
        pictures = scan_image_folder(root)
        self.later = evaluate_pairs(verifier, pictures, every_pair(pictures))
        self.spread = resample(self.later)
        options = ["--pairs", "all", "--images", "none", "--no_cache"]
        eval_command.main(
            ["-v", str(root), "-o", str(self.results), "-c", str(bundle), *options], standalone_mode=False
        )
        self.files = {name: (self.results / name).read_bytes() for name in ("metrics.json", "pairs.csv")}

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        name = ("metrics.json", "pairs.csv")[number % 2]
        data = self.files[name]
        if name == "metrics.json" and random.randint(4):
            data = json_bytes(mutated_json(random, json.loads(data), most=2))
        elif name == "pairs.csv" and random.randint(2):
            lines = data.split(b"\n")
            k = random.randint(len(lines))
            fields = lines[k].split(b",")
            new = (b"nan", b"inf", b"-0.0", b"1e-400", b"1.0000001", b"", b"1_0", "\u0661".encode(), b'"', b"\0")
            fields[random.randint(len(fields))] = new[random.randint(len(new))]
            lines[k] = b",".join(fields)
            data = b"\n".join(lines)
        else:
            data = mutated(random, data)
        return name.encode() + b"\0" + data

    def check(self, data: bytes) -> str:
        name, _, content = data.partition(b"\0")
        file = self.results / name.decode()
        file.write_bytes(content)
        try:
            earlier, digest = read_earlier(self.results, self.later)
            scores = earlier.scores
            assert ((scores >= 0) & (scores <= 1)).all()
            change = compare(earlier, self.later, digest, self.spread)
            json.dumps(change.content(), allow_nan=False)
            change.table()
            return "compared"
        except SiameseError as error:
            return type(error).__name__
        finally:
            file.write_bytes(self.files[file.name])

    def sabotage(self) -> None:
        """Anything is a number."""
        siamese_deploy.comparison.read_scores = lambda file, evaluation: np.array(
            [float(line.split(",")[3]) for line in file.read_text().splitlines()[1:]], np.float32
        )


class Baselines(Target):
    """The bench.json of an earlier run: an error of ours, or a comparison."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "bench.json"
        machine = describe_machine(None, with_gpu=False)
        windows = (Window(2.0, 480.0), Window(2.5, 400.0), Window(2.25, 450.0))
        self.rows = [
            Row("tiny", "d" * 64, "fp32", "cpu", scenario, batch, "ok", windows=windows)
            for scenario, batch in (("SingleStream", 1), ("MultiStream", 8), ("Offline", 32))
        ]
        self.now = {"pair_digest": "p" * 64}
        self.machine = machine
        self.whole = bench_json(bench_content(self.rows, Settings(), machine, self.now, complete=True))

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        if random.randint(4) == 0:
            return mutated(random, self.whole)
        return json_bytes(mutated_json(random, json.loads(self.whole), most=2))

    def check(self, data: bytes) -> str:
        self.file.write_bytes(data)
        try:
            baseline = read_baseline(self.file)
            refuse_other_run(baseline, self.machine, self.now, any_machine=len(data) % 2 == 0)
            changes = compare_with(baseline, self.rows)
        except SiameseError as error:
            return type(error).__name__
        assert all(change.line() and change.more > -1 for change in changes)
        return "compared"

    def sabotage(self) -> None:
        """What is wrong with the file comes through as an error of another kind."""
        siamese_deploy.bench.regression.IntegrityError = ValueError


class Keys(Target):
    """Key files and signatures: an error of ours, or the very same key."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "key.pem"
        key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        other = X25519PrivateKey.from_private_bytes(bytes(range(32)))
        others = (
            other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        )
        self.keys = (private, public, *others)
        self.file.write_bytes(private)
        self.signature = SigningKey(self.file).sign(b"manifest")

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        key = self.keys[number % 2 if random.randint(4) else random.randint(len(self.keys))]
        signature = mutated(random, self.signature, most=1) if random.randint(4) == 0 else self.signature
        if random.randint(3) == 0:  # behind the armour
            head, *body, end = key.strip().split(b"\n")
            inner = base64.b64encode(mutated(random, base64.b64decode(b"".join(body)), most=2))
            key = b"\n".join([head, inner, end, b""])
        elif random.randint(4):
            key = mutated(random, key, self.keys)
        return signature.hex().encode() + b"\0" + key

    def check(self, data: bytes) -> str:
        signature, _, key = data.partition(b"\0")
        self.file.write_bytes(key)
        given = bytes.fromhex(signature.decode())
        outcome = []
        try:
            VerifyKey(self.file).check(b"manifest", given, self.file)
            assert given == self.signature, "another signature passes"
            outcome.append("the signer's")
        except SiameseError as error:
            outcome.append(type(error).__name__)
        try:
            outcome.append(f"signs {len(SigningKey(self.file).sign(b'manifest'))} bytes")
        except SiameseError as error:
            outcome.append(type(error).__name__)
        return ", ".join(outcome)

    def sabotage(self) -> None:
        """Whatever the parser of keys raises comes through."""
        siamese_deploy.signature._no_key = lambda path, which: ValueError(which)
