"""Shards to an object store and back: the store's streams against boto3 alone, on the same server.

    python tests/bench/bench_upload.py                # two minutes; Ceph's gateway where it is installed, else moto
    python tests/bench/bench_upload.py --server moto
    python tests/bench/bench_upload.py --server env   # what the AWS variables name; --bucket must exist there

Up: `Store.open_output` is given 174 MB (a shard of 1,000 pairs) in writes of 100 KB, as a tar is written. boto3 is
given the finished file: `upload_fileobj` with its default settings (parts of 8 MiB, ten threads) and `put_object`.
Down: `Store.open_input` in reads of 1 MiB; boto3's `download_fileobj` into a file that forgets, and `get_object`. All
take turns within each round. Peak memory is the growth of the resident set's high-water mark (VmHWM, Linux alone) in a
fresh process each.

Prints a table and, last, one line of JSON. Exits with 1 if the store's upload is below 0.85 of `upload_fileobj`, which
is what boto3 does with a file of this size. `put_object` stands beside it without a target: it can begin only once the
shard is finished, takes 5 GB at the most, and is sent again from its first byte when the connection breaks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3

from pipeline import s3
from pipeline.storage import Store
from tests.memory import peak_growth_bytes
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
GATEWAY = ROOT / "infra/objectstore/radosgw.sh"
SHARD_BYTES = 174_000_000
WRITE_BYTES = 100_000
READ_BYTES = 1 << 20
MIN_RATIO = 0.85
CHUNK = random.Random(0).randbytes(WRITE_BYTES)


class Sink:
    """A file that forgets; a seekable one, as boto3's threads want it."""

    def write(self, data: bytes) -> int:
        return len(data)

    def seek(self, position: int) -> int:
        return position

    def tell(self) -> int:
        return 0

    def seekable(self) -> bool:
        return True


def open_output(bucket: str, _: Path) -> None:
    with Store.from_uri(f"s3://{bucket}").open_output("ours.tar") as stream:
        for _number in range(SHARD_BYTES // WRITE_BYTES):
            stream.write(CHUNK)


def upload_fileobj(bucket: str, shard: Path) -> None:
    with shard.open("rb") as stream:
        boto3.client("s3").upload_fileobj(stream, bucket, "boto3.tar")


def put_object(bucket: str, shard: Path) -> None:
    with shard.open("rb") as stream:
        boto3.client("s3").put_object(Bucket=bucket, Key="boto3.tar", Body=stream)


def open_input(bucket: str, _: Path) -> None:
    with Store.from_uri(f"s3://{bucket}").open_input("ours.tar") as stream:
        while stream.read(READ_BYTES):
            pass


def download_fileobj(bucket: str, _: Path) -> None:
    boto3.client("s3").download_fileobj(bucket, "ours.tar", Sink())


def get_object(bucket: str, _: Path) -> None:
    body = boto3.client("s3").get_object(Bucket=bucket, Key="ours.tar")["Body"]
    while body.read(READ_BYTES):
        pass


UP = {"Store.open_output": open_output, "boto3 upload_fileobj": upload_fileobj, "boto3 put_object": put_object}
DOWN = {"Store.open_input": open_input, "boto3 download_fileobj": download_fileobj, "boto3 get_object": get_object}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--server", choices=("radosgw", "moto", "env"))
    parser.add_argument("--bucket", help="with --server env")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        s3.client().list_objects_v2(Bucket=arguments.bucket, MaxKeys=1)  # what a first request loads is no method's
        run = (UP | DOWN)[arguments.peak]
        print(peak_growth_bytes(lambda: run(arguments.bucket, arguments.shard)))
        return 0
    has_gateway = subprocess.run([GATEWAY, "check"], capture_output=True, check=False).returncode == 0
    name = arguments.server or ("radosgw" if has_gateway else "moto")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(SERVERS[name](folder))
        bucket = arguments.bucket or f"bench-{uuid.uuid4().hex[:8]}"
        if not arguments.bucket:
            s3.client().create_bucket(Bucket=bucket)
        s3.client()  # sets the checksum variables for boto3 too: Ceph refuses its default
        shard = folder / "shard.tar"
        shard.write_bytes(CHUNK * (SHARD_BYTES // WRITE_BYTES))
        seconds = time_all(bucket, shard, num_rounds=arguments.rounds)
        peaks = {method: measure_peak(method, bucket, shard) for method in seconds}
    return report(name, seconds, peaks)


def time_all(bucket: str, shard: Path, *, num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round for each method, after one round that does not count."""
    seconds: dict[str, list[float]] = {method: [] for method in UP | DOWN}
    for number in range(num_rounds + 1):
        methods = list((UP | DOWN).items())
        for method, run in methods if number % 2 else methods[:3][::-1] + methods[3:][::-1]:
            start = time.perf_counter()
            run(bucket, shard)
            if number:
                seconds[method].append(time.perf_counter() - start)
    return seconds


def report(server: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> int:
    print(f"{SHARD_BYTES / 1e6:.0f} MB on {server}, {len(next(iter(seconds.values())))} rounds")
    print(f"{'':24}{'MB/s':>8}{'peak MiB':>10}   times boto3's speed")
    speeds = {method: SHARD_BYTES / 1e6 / statistics.median(times) for method, times in seconds.items()}
    ratios: dict[str, dict[str, float]] = {}
    for ours, *theirs in (UP, DOWN):
        # Within each round, so that other load hits all alike.
        ratios[ours] = {
            other: statistics.median(b / a for a, b in zip(seconds[ours], seconds[other], strict=True))
            for other in theirs
        }
        for method in (ours, *theirs):
            told = ", ".join(f"{ratio:.2f} of {other}" for other, ratio in ratios.get(method, {}).items())
            print(f"{method:24}{speeds[method]:8.0f}{peaks[method] / 2**20:10.0f}   {told}")
    print(json.dumps({"server": server, "ratios": ratios, "mb_per_s": speeds, "peak_bytes": peaks}))
    return 0 if ratios["Store.open_output"]["boto3 upload_fileobj"] >= MIN_RATIO else 1


def measure_peak(method: str, bucket: str, shard: Path) -> int:
    command = [sys.executable, __file__, "--peak", method, "--bucket", bucket, "--shard", str(shard)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[None]:
    (port,) = free_ports(1)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
        try:
            while not is_open(port):
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            server.wait()


@contextlib.contextmanager
def radosgw(folder: Path) -> Iterator[None]:
    port, mon_port = free_ports(2)
    command = [GATEWAY, "start", folder / "ceph", str(port)]
    environment = os.environ | {"MON_PORT": str(mon_port)}
    started = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    os.environ |= dict(re.findall(r"export (\w+)=(\S+)", started.stdout))
    try:
        yield
    finally:
        subprocess.run([GATEWAY, "stop", folder / "ceph"], check=True)


@contextlib.contextmanager
def env(_: Path) -> Iterator[None]:
    yield


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


SERVERS = {"radosgw": radosgw, "moto": moto, "env": env}


if __name__ == "__main__":
    sys.exit(main())
