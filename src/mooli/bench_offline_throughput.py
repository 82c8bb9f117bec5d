"""`python3 -m mooli.bench_offline_throughput`: throughput of an engine in this process, under SGLang's name for it.

Owns nothing but the name: `mooli bench offline` is the same, and lives in `mooli.bench.offline`.
"""

from mooli.entry import run


def main() -> int:
    """Run the command and return the exit status."""
    from mooli.bench.offline import main as measure

    return measure()


if __name__ == "__main__":
    run(main)
