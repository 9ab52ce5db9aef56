"Errors of completions as small models write them, of two mistakes at once, of hostile texts; and the judge."
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError, refused
from echochamber.data.formats import RENDERERS, StyleConfig, parse_completion, recognise, replace_operation
from echochamber.data.problems import FAMILIES, ProblemConfig, Quantity, Step, generate_problems, write_story
from echochamber.grading import errors
from echochamber.grading.errors import (
    ERRORS,
    JUDGED,
    JudgeConfig,
    ask_judge,
    error_class,
    judge_request,
    judged_class,
    problem_chain,
    program_chain,
    prose_chain,
    transitions,
    with_errors,
    with_judgements,
)

PROBLEMS = generate_problems(ProblemConfig(operations=(2, 5)), 80, 5, "test")
FIELDS = dict(name="Ben", friend="Mia", thing="egg", things="eggs", foods="pies", he="he", He="He", him="him")


def story(family: str, start: int, *events: tuple[str, int]):
    "The problem of a family whose events are named by what their number means."
    known = {event.number: event for event in FAMILIES[family].first + FAMILIES[family].later}
    return write_story(family, start, [(known[name], number) for name, number in events], FIELDS)


SHOP = story("shopping", 7, ("price", 6), ("bag", 10))                    # 7 * 6 + 10 = 52
CARDS = story("collecting", 3, ("bought", 9), ("found", 5))               # 3 + 9 + 5 = 17
RIDE = story("riding", 12, ("got on", 3), ("got off", 5))                 # 12 + 3 - 5 = 10


def program(*lines: str) -> str:
    return "\n    ".join(["def simple_math_problem() -> int:", *lines, "return result"])


@pytest.mark.parametrize("problem, completion, error", [
    (SHOP, program("eggs = 7", "price = 6", "bag = 10", "bag = 10", "cost = eggs * price", "total = cost + bag",
                   "result = total + bag"), "extra step"),
    (SHOP, program("eggs = 7", "price = 6", "bag = 10", "cost = eggs + price", "result = cost + bag"), "wrong operation"),
    (SHOP, program("eggs = 7", "price = 5", "bag = 10", "cost = eggs + price", "result = cost - bag"), "misread number"),
    (SHOP, program("eggs = 7", "price = 6", "bag = 10", "cost = eggs * price", "total = cost + bag", "result = cost"),
     "missing step"),  # computed and forgotten
    (SHOP, program("result = (6 * 7) + 11"), "misread number"),
    (SHOP, program("a = 7", "b = 6", "c = 10", "d = b * a", "result = c - d"), "wrong operation"),
    (SHOP, program("a = 7", "b = 6", "d = b * a", "result = d + d"), "other"),
    (SHOP, program("a = 7", "b = 10", "c = 6", "d = a + b", "result = d * c"), "other"),  # another order
    (SHOP, program("result = 0", "for i in range(7):", "    result += 6"), "other"),
    (SHOP, program("result = 42"), "missing step"),
    (CARDS, program("cards = 3", "found = 9", "found = 5", "total = cards + found", "result = total + found"),
     "misread number"),  # the name of one number taken by another
    (CARDS, "<llm-code>\neggs = 3\nbought = 9\ntotal = eggs + bought\ntotal\n</llm-code>\nSo \\boxed{17}.", "missing step"),
    (CARDS, "Buying more gives 9 + 3 = 12 eggs.\nFinding more gives 12 + 5 = 18 eggs.\n\\boxed{18}", "arithmetic slip"),
    (CARDS, "Buying more gives 3 + 9 = 11 eggs.\nFinding more gives 11 + 6 = 17 eggs.\n\\boxed{18}", "arithmetic slip"),
    (CARDS, "Buying more gives 3 + 8 = 12 eggs.\nFinding more gives 12 + 5 = 18 eggs.\n\\boxed{18}", "misread number"),
    (CARDS, "Buying more gives 3 + 9 = 12 eggs.\nFinding more gives 11 + 5 = 16 eggs.\n\\boxed{16}", "misread number"),
    (CARDS, "Buying more gives 3 + 9 = 12 eggs.\nFinding more gives 5 + 12 = 17 eggs.\n\\boxed{12}", "misread number"),
    (RIDE, "There are 12 plus 3 equals 15.\nThere are 5 minus 15 equals 10.\n\\boxed{-10}", "wrong operation"),
    (RIDE, "After the park there are 12 + 3 = 15. After the bank 15 - 5 = 10. After the mall 10 - 2 = 8.\n\\boxed{8}",
     "extra step"),
    (RIDE, "There are 12 + 3 - 5 = 9 people.\n\\boxed{9}", "other"), (RIDE, "The answer is 7.", "missing step")])
def test_error_of_a_text(problem, completion, error):
    format = recognise(completion)
    assert error_class(problem, completion, "wrong", True, format) == error
    assert error_class(problem, "\n\n" + completion, "wrong", True, format) == error
    assert error_class(problem, completion, "correct", True, format) == "correct"
    assert error_class(problem, completion, "wrong", False, format) == "incomplete"
    for outcome in ("error", "timeout", "unsupported", "no_answer"):
        assert error_class(problem, completion, outcome, True, format) == "format broken"


def read_back(problem, format: str):
    solution = RENDERERS[format](problem, StyleConfig(words=0.5), random.Random(0))
    return prose_chain(solution) if format == "omi2" else program_chain(parse_completion(solution).cells)


@pytest.mark.parametrize("format", RENDERERS)
def test_every_solution_reads_as_its_chain(format):
    assert all(read_back(problem, format) == problem_chain(problem) for problem in PROBLEMS)


@given(st.sampled_from(PROBLEMS), st.sampled_from(list(RENDERERS)), st.integers(0, 99), st.booleans())
def test_the_first_of_two_mistakes_is_named(problem, format, seed, operation_first):
    "A wrong operation and, in another step, a wrong number: the earlier of the two."
    rng = random.Random(seed)
    first, second = sorted(rng.sample(range(problem.level), 2))
    changed, misread = (first, second) if operation_first else (second, first)
    step = problem.steps[misread]
    steps = list(problem.steps)
    steps[misread] = replace(step, right=replace(step.right, value=step.right.value + rng.randint(13, 40)))
    try:  # the operation is replaced and all results follow
        told = replace_operation(replace(problem, steps=tuple(steps)), changed)
    except ValueError:
        return  # a division with a remainder
    expected = "wrong operation" if operation_first else "misread number"
    solution = RENDERERS[format](told, StyleConfig(), rng)
    assert error_class(problem, solution, "wrong", True, format) == expected


def test_steps_that_are_no_chain_are_refused():
    a, b, c, d = (Quantity(value, name) for value, name in ((1, "a"), (2, "b"), (3, "c"), (4, "d")))
    sums = Quantity(3, "e", 0), Quantity(7, "f", 1), Quantity(10, "g", 2)
    steps = (Step("+", a, b, sums[0], "{sum}"), Step("+", c, d, sums[1], "{sum}"), Step("+", *sums, "{sum}"))
    with pytest.raises(StudyError, match="no chain"):
        problem_chain(replace(SHOP, steps=steps))


@pytest.mark.parametrize("body", [
    "x = 1\n" + "x = x + x\n" * 500 + "x", "x = 1\n" + "x = x + 1\n" * 1500 + "x", "1 + " * 4000 + "1", "(" * 900, "x = True\nx",
    "x = 1e999\nx", "9" * 5000, "x = -(-3)\nx", "x, y = 3, 4\nx", "\0", "", "def f(): pass", "return 3", "x = 3 % 2\nx"])
def test_no_program_is_too_much(body):
    completion = f"<llm-code>\n{body}\n</llm-code>\nSo \\boxed{{3}}."
    assert error_class(SHOP, completion, "wrong", True, "omi1") in ERRORS


def test_long_prose_is_read_in_linear_time():
    assert len(prose_chain("3 + 4 = 7, " * 20_000).moves) == 20_000
    assert prose_chain("3 + " * 100_000).moves == () == prose_chain("3" * 100_000 + " + 4 = 7").moves
    assert prose_chain("4 + " + "3" * 5000 + " = 7").moves == ()  # more digits than Python reads


# --- frames -------------------------------------------------------------------------------------------------------------

def evaluation(seed: int = 0) -> pd.DataFrame:
    "Two seeds, all formats, right and wrong, in categories as results are stored."
    rng, rows = random.Random(seed), []
    for which in range(2):
        for place, problem in enumerate(PROBLEMS):
            for sample, format in enumerate(RENDERERS):
                wrong = rng.random() < 0.5
                told = replace_operation(problem, problem.level - 1) if wrong else problem
                rows.append(dict(seed=which, problem=place, mode="sampled", sample=sample, question=problem.question,
                                 answer=problem.answer, completion=RENDERERS[format](told, StyleConfig(), random.Random(0)),
                                 outcome="wrong" if wrong else "correct", ended=True, format=format))
    return pd.DataFrame(rows).astype({"outcome": "category", "format": "category"})


def test_frame_agrees_with_single_completions():
    frame = evaluation().sample(frac=1, random_state=0)
    found = with_errors(frame, PROBLEMS)
    assert found.error.tolist() == [error_class(PROBLEMS[r.problem], r.completion, r.outcome, r.ended, r.format)
                                    for r in frame.itertuples()]
    assert set(found.error) == {"correct", "wrong operation"} and found.drop(columns="error").equals(frame)


@pytest.mark.parametrize("change", [lambda frame: frame.drop(columns="ended"), lambda frame: frame.assign(problem=frame.problem + 1),
                                    lambda frame: frame.drop(columns="question").assign(problem=frame.problem + 1)])
def test_frame_of_other_problems_is_refused(change):
    with pytest.raises(StudyError):
        with_errors(change(evaluation()), PROBLEMS)


def test_transitions_count_pairs():
    before, after = (with_errors(evaluation(seed), PROBLEMS) for seed in (0, 1))
    table = transitions(before, after.sample(frac=1, random_state=0))
    right = [(frame.outcome == "correct").to_numpy() for frame in (before, after)]
    assert table.loc["wrong operation", "correct"] == (~right[0] & right[1]).sum() > 0
    assert table.loc["correct", "wrong operation"] == (right[0] & ~right[1]).sum() > 0
    assert table.to_numpy().sum() == len(before) and list(table.columns) == list(table.index) == list(ERRORS)
    for other in (after[1:], after.assign(seed=after.seed + 1), after.drop(columns="error"), pd.concat([after, after[:1]])):
        with pytest.raises(StudyError):
            transitions(before, other)


# --- the judge ----------------------------------------------------------------------------------------------------------

class Judge(ThreadingHTTPServer):
    """Answers like an OpenAI-compatible endpoint: `replies` in turn.

    Each is the content of a message, raw bytes, many of them to be sent one by one, or a status with or without headers."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Answer)
        self.replies, self.asked = list(replies), []
        self.config = JudgeConfig(url=f"http://127.0.0.1:{self.server_port}/v1", model="judge", key_variable="JUDGE_KEY",
                                  seconds=5)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        reply = self.server.replies.pop(0)
        status, headers = reply if isinstance(reply, tuple) else (reply, {}) if isinstance(reply, int) else (200, {})
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if status == 200:
            if not isinstance(reply, bytes | Iterator):
                reply = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            try:
                for piece in [reply] if isinstance(reply, bytes) else reply:
                    self.wfile.write(piece)
            except OSError:  # the other side has had enough
                pass


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.01, 0.02, 0.03))
    servers = []
    yield lambda *replies: servers.append(Judge(*replies)) or servers[-1]
    for server in servers:
        server.shutdown()
        server.server_close()


FRAME = pd.DataFrame({"question": ["1 + 1?", "1 + 2?", "1 + 3?", "1 + 4?"], "answer": ["2", "3", "4", "5"],
                      "completion": ["3", "3", "5", "6"], "outcome": ["wrong", "correct", "wrong", "no_answer"]})


def test_judgements_are_asked_once_and_kept(judge, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " secret\n")
    server = judge("Arithmetic.", "It could be anything.", "I think:\nwrong formula")
    for _ in range(2):
        judged = with_judgements(FRAME, server.config, tmp_path)
        assert judged.judged.tolist() == ["arithmetic", "correct", "unclear", "wrong formula"]
    assert len(server.asked) == 3 == len(list(tmp_path.iterdir()))
    path, key, body = server.asked[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "judge", 0)
    prompt = body["messages"][0]["content"]
    assert all(name in prompt for name in JUDGED) and "1 + 1?" in prompt
    assert "secret" not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_another_model_is_asked_anew(judge, tmp_path):
    server = judge("logic", "logic", "logic", "notation", "notation", "notation")
    assert set(with_judgements(FRAME, server.config, tmp_path).judged) == {"correct", "logic"}
    other = server.config.model_copy(update={"model": "other"})
    assert set(with_judgements(FRAME, other, tmp_path).judged) == {"correct", "notation"}
    assert server.asked[0][1] is None  # no key, none sent


def test_the_same_model_elsewhere_is_asked_anew(judge, tmp_path):
    here, there = judge("logic"), judge("notation")
    for server, name in ((here, "logic"), (there, "notation"), (here, "logic")):
        assert with_judgements(FRAME[:1], server.config, tmp_path).judged.tolist() == [name]
    slash = here.config.model_copy(update={"url": here.config.url + "/"})
    assert with_judgements(FRAME[:1], slash, tmp_path).judged.tolist() == ["logic"]  # the same place


NOTHING = [None, "", " \n", 3, ["logic"], {"text": "logic"}]


@pytest.mark.parametrize("reply", [401, (302, {"Location": "http://127.0.0.1:9/"}), b"", b"<html>", b"[]", b"{}", b"\xff\xfe\x00",
                                   b'{"choices": []}', b'{"choices": [{"message": 3}]}', b'{"choices": [{"message": {}}]}',
                                   b"[" * 200_000, b"1" * 10_000, b" " * 1_100_000, (500, {"Retry-After": "3600"}), *NOTHING],
                         ids=lambda reply: repr(reply)[:30])
def test_a_judge_without_an_answer_is_one_clear_error(judge, tmp_path, reply):
    server = judge("logic", reply, "logic", "logic")
    with pytest.raises(StudyError, match=rf"{server.config.url}.*`judge`.*\$JUDGE_KEY.*kept") as caught:
        with_judgements(FRAME, server.config, tmp_path)
    assert "\n" not in str(caught.value) and len(list(tmp_path.iterdir())) == 1
    assert set(with_judgements(FRAME, server.config, tmp_path).judged) == {"correct", "logic"}  # and goes on
    assert len(server.asked) == 4


@pytest.mark.parametrize("text", ["logic \ud800", "\udfff", "a \ud83d b"])
def test_half_a_surrogate_pair_is_kept_as_a_question_mark(judge, tmp_path, text):
    server = judge(text)
    for _ in range(2):
        named = with_judgements(FRAME[:1], server.config, tmp_path).judged.tolist()
        assert named == ["logic" if "logic" in text else "unclear"]
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["reply"] == text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b'{"reply": null}', b'{"reply": 3}', b"\xff", b"[" * 200_000],
                         ids=lambda content: repr(content)[:30])
def test_a_damaged_file_is_asked_for_again(judge, tmp_path, content):
    server = judge("logic", "notation")
    with_judgements(FRAME[:1], server.config, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    for _ in range(2):
        assert with_judgements(FRAME[:1], server.config, tmp_path).judged.tolist() == ["notation"]
    assert list(tmp_path.iterdir()) == [file] and len(server.asked) == 2


def test_a_judge_who_sends_a_byte_now_and_then_is_given_up(judge):
    end = threading.Event()
    server = judge(b" " for _ in range(1000) if not end.wait(0.05))
    begun = time.monotonic()
    assert "nothing whole within 0.3 seconds" in refused(ask_judge, server.config.model_copy(update={"seconds": 0.3}), "?")
    assert time.monotonic() - begun < 30  # whoever waits for all of it takes 50 s
    end.set()


def test_a_judge_who_never_ends_is_given_up(judge):
    sent = []
    server = judge(sent.append(1) or b" " * 100_000 for _ in range(10_000))
    assert "more than 1000000 bytes" in refused(ask_judge, server.config, "?")
    assert len(sent) < 1000  # what fits into the buffers of the system


def test_a_busy_judge_is_asked_again(judge, monkeypatch):
    waited = []
    monkeypatch.setattr(errors, "time", type("Clock", (), {"sleep": waited.append}))
    server = judge(429, (503, {"Retry-After": "7"}), (500, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}), "logic")
    assert ask_judge(server.config, "?") == "logic" and waited == [0.01, 7, 0.03]
    server = judge(429, 500, 502, 503, "logic")
    assert "HTTP Error 503" in refused(ask_judge, server.config, "?") and len(server.asked) == 4
    server = judge((429, {"Retry-After": "9" * 5000}), "logic")
    assert "HTTP Error 429" in refused(ask_judge, server.config, "?") and len(server.asked) == 1


@pytest.mark.parametrize("variable", ["", "OPENAI_API_KEY"])
def test_a_key_is_sent_only_if_it_is_named(judge, monkeypatch, variable):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = judge("logic")
    named = {"key_variable": variable} if variable else {}
    ask_judge(JudgeConfig(url=server.config.url, model="judge", **named), "?")
    assert server.asked[0][1] == ("Bearer secret" if variable else None)


NEAR = ["https://a.org/v1", "http://localhost:8000/v1", "http://127.0.0.1", "http://[::1]:80/v1"]
FAR = ["http://a.org/v1", "http://localhost.a.org", "http://localhost@a.org/", "http://127.0.0.1:80@a.org/", "http://127.0.0.11/",
       "http://localhost:80\\@a.org", "http://a.org/localhost", "http://a.org?http://localhost/"]


def test_a_key_does_not_travel_in_the_open(monkeypatch):
    def config(url):
        return JudgeConfig(url=url, model="judge", key_variable="JUDGE_KEY")

    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert all(judge_request(config(url), "?").get_header("Authorization") == "Bearer secret" for url in NEAR)
    for url in FAR:
        assert "plain http" in (told := refused(ask_judge, config(url), "?")) and "secret" not in told
    monkeypatch.setenv("JUDGE_KEY", "sec\nret")
    assert "$JUDGE_KEY" in (told := refused(ask_judge, config(NEAR[0]), "?")) and "ret" not in told
    monkeypatch.delenv("JUDGE_KEY")
    assert not any(judge_request(config(url), "?").has_header("Authorization") for url in NEAR + FAR)


def test_a_proxy_does_not_see_what_this_machine_is_asked(judge, monkeypatch):
    proxy, server = judge(), judge("logic")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert ask_judge(server.config, "?") == "logic" and not proxy.asked


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://localhost:port", "http://a b/", "http://127.0.0.1:9/\u20ac"])
def test_an_address_that_is_none_is_one_sentence(url):
    assert "check the address" in refused(ask_judge, JudgeConfig(url=url, model="judge", seconds=5), "?")


@pytest.mark.parametrize("reply, name", {
    "Answer: logic": "logic", "**Wrong Formula**.": "wrong formula", "wrong_formula": "wrong formula", "the logic, I think": "logic",
    "Not arithmetic.\nlogic": "logic", "Kind: notation\nI am sure.": "notation", "logic, arithmetic": "unclear",
    "logic, and again logic": "logic", "arithmetic\nlogic\nboth": "unclear", "logical": "unclear", "formula": "unclear", "wrong": "unclear",
}.items())
def test_a_reply_counts_if_it_names_one_class(reply, name):
    assert judged_class(reply) == name


def test_nobody_there():
    server = Judge()
    server.shutdown()
    server.server_close()
    with pytest.raises(StudyError, match="run again"):
        ask_judge(server.config, "?")
