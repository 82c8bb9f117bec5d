"""`python3 -m mooli.bench_one_batch`: prefill and decode by batch size, under SGLang's name for it.

Owns nothing but the name: `mooli bench one-batch` is the same, and lives in `mooli.bench.one_batch`.
"""

from mooli.entry import run


def main() -> int:
    """Run the command and return the exit status."""
    from mooli.bench.one_batch import main as measure

    return measure()


if __name__ == "__main__":
    run(main)
