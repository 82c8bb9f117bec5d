"""The conversations that benchmarks/drafts.py replays: code that is given to be changed, and chats of several turns.

Owns the texts. The code is written for this purpose.
"""

from __future__ import annotations

INVENTORY = """\
class Inventory:
    def __init__(self):
        self.items = {}
        self.history = []

    def add(self, name, count):
        if count <= 0:
            raise ValueError("count must be positive")
        self.items[name] = self.items.get(name, 0) + count
        self.history.append(("add", name, count))

    def remove(self, name, count):
        if count <= 0:
            raise ValueError("count must be positive")
        if self.items.get(name, 0) < count:
            raise KeyError(name)
        self.items[name] -= count
        if self.items[name] == 0:
            del self.items[name]
        self.history.append(("remove", name, count))

    def total(self):
        return sum(self.items.values())

    def report(self):
        lines = []
        for name, count in sorted(self.items.items()):
            lines.append(f"{name}: {count}")
        return "\\n".join(lines)
"""

LEDGER = """\
import csv


def read_rows(path):
    rows = []
    with open(path) as file:
        for row in csv.DictReader(file):
            row["amount"] = float(row["amount"])
            rows.append(row)
    return rows


def by_month(rows):
    months = {}
    for row in rows:
        month = row["date"][:7]
        months.setdefault(month, []).append(row)
    return months


def balance(rows):
    total = 0.0
    for row in rows:
        if row["kind"] == "income":
            total += row["amount"]
        else:
            total -= row["amount"]
    return total


def print_report(path):
    rows = read_rows(path)
    for month, month_rows in sorted(by_month(rows).items()):
        print(month, balance(month_rows))
    print("total", balance(rows))
"""

QUEUE = """\
function createQueue(limit) {
  const waiting = [];
  let running = 0;

  function next() {
    if (running >= limit || waiting.length === 0) {
      return;
    }
    running += 1;
    const job = waiting.shift();
    job.task().then(
      (value) => {
        running -= 1;
        job.resolve(value);
        next();
      },
      (error) => {
        running -= 1;
        job.reject(error);
        next();
      },
    );
  }

  return {
    push(task) {
      return new Promise((resolve, reject) => {
        waiting.push({ task, resolve, reject });
        next();
      });
    },
    size() {
      return waiting.length + running;
    },
  };
}
"""

_ASK = "Give the whole file back, changed as asked, in one code block and nothing else."

CODE_EDITING: list[list[str]] = [
    [f"{_ASK} Rename the method `total` to `count_all`.\n\n```python\n{INVENTORY}```"],
    [f"{_ASK} Add type hints to every method.\n\n```python\n{INVENTORY}```"],
    [
        f"{_ASK} Give every function a docstring of one line.\n\n```python\n{LEDGER}```",
        f"{_ASK} Now write the report to a file instead of printing it.",
    ],
    [f"{_ASK} Rename `rows` to `entries` everywhere.\n\n```python\n{LEDGER}```"],
    [
        f"{_ASK} Add a method `clear` that rejects what is waiting.\n\n```javascript\n{QUEUE}```",
        f"{_ASK} Rename `createQueue` to `makeQueue`.",
    ],
]
"""Each: the user's messages of one conversation."""

MULTI_TURN: list[list[str]] = [
    [
        "Explain in a few sentences how a bicycle stays upright.",
        "Say the same for a child of six years.",
        "Which of the two explanations is better for a school book, and why?",
    ],
    [
        "List five dishes that can be cooked in one pot, with one sentence about each.",
        "Sort the list by cooking time, and add the time to each.",
        "Write a shopping list for the first two.",
    ],
    [
        "Write a short email that moves a meeting from Tuesday to Thursday.",
        "Make it more formal.",
        "Now write the answer that accepts the new date.",
    ],
    [
        "What is the difference between weather and climate?",
        "Give an example of each from Northern Europe.",
        "Summarise our conversation in three bullet points.",
    ],
]
"""Each: the user's messages of one conversation."""
