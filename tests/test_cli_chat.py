# SPDX-License-Identifier: Apache-2.0
"""Conversations: what the chat template makes of them, and that the loss is on what the assistant says alone."""

from __future__ import annotations

import json

import pytest
from cli_helpers import CHAT, call, conversations, make_chat_data, make_chat_model, make_model, same_end, sentence

from gralora_ext.cli.chat import read_template
from gralora_ext.cli.data import IGNORED, Encoder
from gralora_ext.cli.rows import Completion
from gralora_ext.program.errors import JobError

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<eos>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As templates of models that think: what was thought is only there in the last answer.
THINKS = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<eos>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
JOB = ("finetune", "--model", "model", "--data", "chat.jsonl", "--steps", 2, "--max-length", 100, "--sample-tokens", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def learned(tokenizer, example):
    """What is learned of an example, with a bar where something between is not."""
    pieces, before = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            pieces = [*pieces, []] if not before else pieces
            pieces[-1].append(token)
        before = label != IGNORED
    return [tokenizer.decode(piece) for piece in pieces]


TURNS = conversations(4)[3]  # dog 3, dog dog dog, and cat, cat dog


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "marks"])
def test_each_answer_with_its_end_is_learned_and_nothing_else(tokenizer, template):
    tokenizer.chat_template = template
    (example,), remarks = Encoder(tokenizer, 100).examples([TURNS], "training")
    assert learned(tokenizer, example) == ["dog dog dog<eos>", "cat dog<eos>"]
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip()
    assert tokenizer.decode(example["input_ids"]) == whole
    assert example["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert remarks == []


@pytest.mark.parametrize("end", ["<eos>\n", ""], ids=["behind the mark", "nowhere"])
def test_an_end_that_a_template_writes_behind_its_marks_is_learned(tokenizer, end):
    mark = "{% generation %}{{ m['content'] }}{% endgeneration %}" + end
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}" + mark
    tokenizer.chat_template += "{% else %}{{ m['content'] }}<eos>\n{% endif %}{% endfor %}"
    (example,), remarks = Encoder(tokenizer, 100).examples([TURNS], "training")
    assert learned(tokenizer, example) == ["dog dog dog<eos>" if end else "dog dog dog", "cat dog<eos>"]
    assert remarks == []


def test_an_answer_whose_mark_has_an_end_of_its_own_gets_no_other(tokenizer):
    tokenizer.chat_template = MARKED.replace("<eos>", "<pad>")
    (example,), _ = Encoder(tokenizer, 100).examples([TURNS], "training")
    assert learned(tokenizer, example) == ["dog dog dog<pad>", "cat dog<pad>"]


def of_characters(merges=(), **prepended):
    """A tokenizer of characters, with ``merges``; ``prepended`` puts a mark of a space before a text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<eos>", "\u2581", "\n", *map(chr, range(33, 127)), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**prepended)
    tokenizer.decoder = decoders.Metaspace(**prepended)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT)


def test_a_token_across_the_beginning_of_an_answer_is_not_made():
    tokenizer = of_characters([(">", "d")], prepend_scheme="never")
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip()
    assert ">d" in tokenizer.convert_ids_to_tokens(tokenizer(whole)["input_ids"])
    (example,), _ = Encoder(tokenizer, 200).examples([TURNS], "training")
    assert learned(tokenizer, example) == ["dog dog dog<eos>", "cat dog<eos>"]


def test_a_space_before_a_text_is_not_put_before_every_piece():
    tokenizer = of_characters(prepend_scheme="first")
    (example,), _ = Encoder(tokenizer, 200).examples([TURNS], "training")
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip()
    assert example["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [piece.strip() for piece in learned(tokenizer, example)] == ["dog dog dog<eos>", "cat dog<eos>"]


def test_all_of_a_conversation_but_its_first_token_is_learned_on_demand(tokenizer):
    (example,), _ = Encoder(tokenizer, 100, answers_only=False).examples([TURNS], "training")
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


def test_the_last_word_has_its_end_though_the_template_ends_others_too(tokenizer):
    tokenizer.chat_template = CHAT.replace("<eos>\n{% endfor", "{% if not loop.last %}<eos>\n{% endif %}{% endfor")
    (example,), _ = Encoder(tokenizer, 100, answers_only=False).examples([TURNS], "training")
    assert tokenizer.decode(example["input_ids"]).endswith("and cat<eos>\n<assistant>cat dog<eos>")


def test_a_conversation_of_one_answer_is_a_prompt_with_its_answer(tokenizer):
    encoder = Encoder(tokenizer, 100)
    asked = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "three"}]
    assert encoder.examples([asked], "training") == encoder.examples([("how many", "three")], "training")


@pytest.mark.parametrize("template", [CHAT, MARKED, THINKS], ids=["prefixes", "marks", "thinks"])
def test_of_a_prompt_and_a_completion_of_messages_only_the_completion_is_learned(tokenizer, template):
    """As TRL learns them: an answer in the prompt is what came before."""
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, 100)
    (example,), remarks = encoder.examples([Completion(TURNS, 3)], "training")
    assert learned(tokenizer, example) == ["cat dog<eos>" if template != THINKS else "<think></think>cat dog<eos>"]
    assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip()
    assert remarks == [] and encoder.sample(Completion(TURNS, 3)) == encoder.sample(TURNS)
    (example,), _ = Encoder(tokenizer, 100, answers_only=False).examples([Completion(TURNS, 3)], "training")
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


def test_what_follows_the_last_answer_is_left_away_and_a_system_message_is_not_learned(tokenizer):
    row = [{"role": "system", "content": "be brief"}, *TURNS[:2], {"role": "user", "content": "thanks"}]
    (example,), _ = Encoder(tokenizer, 100).examples([row], "training")
    assert learned(tokenizer, example) == ["dog dog dog<eos>"]
    assert "thanks" not in tokenizer.decode(example["input_ids"])


def test_answers_that_the_template_writes_otherwise_later_are_counted_and_not_learned(tokenizer):
    tokenizer.chat_template = THINKS
    examples, (remark,) = Encoder(tokenizer, 100).examples([TURNS, TURNS[:2]], "training")
    assert learned(tokenizer, examples[0]) == ["<think></think>cat dog<eos>"]
    assert learned(tokenizer, examples[1]) == ["<think></think>dog dog dog<eos>"]
    assert remark.startswith(
        "1 answers in the 2 training rows are not learned: the chat template writes them otherwise"
    )


def test_a_conversation_that_is_cut_keeps_its_beginning(tokenizer):
    whole = len(Encoder(tokenizer, 100).examples([TURNS], "training")[0][0]["input_ids"])
    (example,), (remark,) = Encoder(tokenizer, whole - 8).examples([TURNS], "training")
    assert learned(tokenizer, example) == ["dog dog dog<eos>"] and len(example["input_ids"]) == whole - 8
    assert remark == f"1 of the 1 training rows are longer than --max-length {whole - 8}: cut"


def test_a_template_that_tells_no_answer_is_refused(tokenizer):
    tokenizer.chat_template = "{% generation %}{% endgeneration %}{{ messages | length }}"
    with pytest.raises(JobError, match="does not tell what the assistant says in any of the 1 training rows"):
        Encoder(tokenizer, 100).examples([TURNS], "training")


def test_a_conversation_that_the_template_refuses_is_quoted(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    says = "fails: roles must alternate: mend it, or the conversation of user, assistant, user, assistant that begins with 'd"
    for row in (TURNS, Completion(TURNS, 1)):
        with pytest.raises(JobError, match=says):
            Encoder(tokenizer, 100).examples([row], "training")


CALLS = CHAT.replace(
    "{{ m['content'] }}", "{{ m['tool_calls'][0]['arguments'] | tojson if m['tool_calls'] else m['content'] }}"
)
# Of models whose templates take OpenAI's text as it is, such as DeepSeek-V3.
CALLS_AS_TEXT = CALLS.replace("['arguments'] | tojson if", "['arguments'] + '' if")


@pytest.mark.parametrize("template", [CALLS, CALLS_AS_TEXT], ids=["makes JSON", "takes a text"])
def test_arguments_of_a_call_are_written_once_as_json_whatever_the_template_takes(tokenizer, template):
    tokenizer.chat_template = template
    row = [TURNS[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": "Rome"}}]}]
    for answers_only, what in (
        (True, ['{"city": "Rome"}<eos>']),
        (False, ['user>dog 3<eos>\n<assistant>{"city": "Rome"}<eos>']),
    ):
        (example,), _ = Encoder(tokenizer, 100, answers_only).examples([row], "training")
        assert learned(tokenizer, example) == what


TOOLS = [{"type": "function", "function": {"name": "walk"}}]
SHOWN = "{% for tool in tools %}[{{ tool['function']['name'] }}]{% endfor %}"


@pytest.mark.parametrize("template", [SHOWN + CHAT, SHOWN + MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("answers_only", [True, False])
def test_tools_of_a_row_are_shown_to_the_model(tokenizer, template, asked, answers_only):
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, 100, answers_only)
    (example,), remarks = encoder.examples([Completion(TURNS[:2], asked, TOOLS)], "training")
    text = tokenizer.decode(example["input_ids"])
    assert text.replace("\n", "") == "[walk]<user>dog 3<eos><assistant>dog dog dog<eos>"
    assert remarks == []
    sample = encoder.sample(Completion(TURNS[:2], asked, TOOLS))
    assert text.startswith(tokenizer.decode(sample.tokens)) and sample.reference == "dog dog dog"


def test_tools_that_the_template_does_not_show_are_counted(tokenizer):
    rows = [Completion(TURNS, 0, TOOLS), Completion(TURNS, 1), TURNS]
    _, remarks = Encoder(tokenizer, 100).examples(rows, "training")
    assert remarks == ["1 of the 3 training rows have tools, which the chat template does not show to the model"]


def test_sample_is_the_last_question_with_what_came_before(tokenizer):
    sample = Encoder(tokenizer, 100).sample(TURNS)
    assert tokenizer.decode(sample.tokens).endswith("<user>and cat<eos>\n<assistant>")
    assert sample.prompt == "user: dog 3\nassistant: dog dog dog\nuser: and cat" and sample.reference == "cat dog"


def test_job_learns_conversations_and_resumes_them(model, tmp_path):
    (tmp_path / "model").symlink_to(model)
    make_chat_data(tmp_path / "chat.jsonl")
    done = call(*JOB, "--no-merge", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 conversations to train on, 4 held out, drawn by --seed 0" in done.stdout
    assert "user: " in done.stdout and "reference: " in done.stdout
    again = call(*JOB, "--no-merge", "--resume", "--steps", 3, cwd=tmp_path)
    assert again.returncode == 0 and "2 of 3 steps done" in again.stdout


def test_job_has_the_same_losses_on_conversations_of_one_answer_and_on_prompts_with_completions(model, tmp_path):
    (tmp_path / "model").symlink_to(model)
    talks = [messages[:2] for messages in conversations(24)]
    for name, rows in (
        ("chat", [{"messages": messages} for messages in talks]),
        ("completions", [{"prompt": messages[:1], "completion": messages[1:]} for messages in talks]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        done = call(*JOB, "--data", f"{name}.jsonl", "--no-merge", "--output", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "20 conversations to train on, 4 held out, drawn by --seed 0" in done.stdout
    same_end(tmp_path / "completions", tmp_path / "chat")


def test_a_model_without_a_template_takes_one_from_a_file(tmp_path):
    make_model(tmp_path / "model")
    make_chat_data(tmp_path / "chat.jsonl")
    refused = call(*JOB, cwd=tmp_path)
    assert refused.returncode == 2
    assert "the rows are conversations, and the tokenizer in" in sentence(refused) and "--chat-template" in sentence(
        refused
    )
    (tmp_path / "t.jinja").write_text(CHAT)
    done = call(*JOB, "--chat-template", "t.jinja", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged = tmp_path / "runs" / "model-chat" / "merged"
    assert (merged / "chat_template.jinja").read_text() == CHAT
    (tmp_path / "t.jinja").write_text(CHAT.replace("<assistant>", "<model>"))
    other = call(*JOB, "--chat-template", "t.jinja", "--resume", "--steps", 3, cwd=tmp_path)
    assert other.returncode == 2 and "was made with other rows than chat.jsonl has now" in sentence(other)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"\xff", "is not UTF-8 text"),
        (b" \n", "is empty"),
        (b"\n{% for %}", r"t:2: Expected"),
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(JobError, match=says):
        read_template(str(tmp_path / "t"))


def test_templates_with_transformers_own_blocks_are_taken(tmp_path):
    (tmp_path / "t").write_text(MARKED + "{% for m in messages %}{% break %}{% endfor %}")
    assert json.dumps(MARKED)[1:-1] in json.dumps(read_template(str(tmp_path / "t")))


def test_answers_that_stand_bare_behind_what_a_template_opens_them_with_are_counted(tokenizer):
    tokenizer.chat_template = CHAT.replace("<assistant>{% endif", "<assistant><think>{% endif")
    (example, _), remarks = Encoder(tokenizer, 100).examples([("dog 1", "dog"), ("cat 1", "cat")], "training")
    assert tokenizer.decode(example["input_ids"]).endswith("<assistant><think>dog<eos>")
    assert remarks[0].startswith("2 answers in the 2 training rows stand bare behind what the chat template opens")
    tokenizer.chat_template = CHAT
    assert Encoder(tokenizer, 100).examples([("dog 1", "dog")], "training")[1] == []
