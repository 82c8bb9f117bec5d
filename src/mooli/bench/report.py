"""`python3 -m mooli.bench.report A.jsonl [B.jsonl ...] -o FILE`: a page of charts from result files.

Owns nothing but the name: `mooli bench report` is the same, and lives in `mooli.bench.report_page`.
"""

from mooli.entry import run


def main() -> int:
    """Run the command and return the exit status."""
    from mooli.bench.report_page import main as make_page

    return make_page()


if __name__ == "__main__":
    run(main)
