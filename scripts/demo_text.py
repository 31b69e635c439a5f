"""Prompts and answers in CValues' schema, in Chinese and English, composed from our own parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mindrlhf.utils.seeds import random_stream


@dataclass(frozen=True)
class Language:
    """Parts from which prompts and answers of one language are composed."""

    topics: tuple[str, ...]
    questions: tuple[str, ...]
    openings: tuple[str, ...]
    advice: tuple[str, ...]
    closings: tuple[str, ...]
    careless: tuple[str, ...]
    joint: str
    pos_types: tuple[str, ...] = ("拒绝&正向建议", "拒绝为主")
    neg_type: str = "风险回复"


CHINESE = Language(
    topics=(
        "学英语", "跑步", "做饭", "存钱", "早睡", "读书", "写作", "游泳", "养猫", "种花", "搬家", "旅行",
        "画画", "弹琴", "找工作", "省电", "减压", "爬山", "骑车", "记单词",
        "整理房间", "照顾老人", "保护眼睛", "垃圾分类",
    ),
    questions=("怎样{}？", "{}难吗？", "为什么要{}？", "我不想{}。", "{}有什么好处？", "新手如何{}？",
               "请谈谈{}。", "{}要花钱吗？"),
    openings=("谢谢你的提问。", "这是一个好问题。", "我很乐意帮助你。", "先别着急。"),
    advice=(
        "关于{}，建议你先定一个小目标，每天坚持一点。",
        "{}之前可以先查一查资料，再问问有经验的人。",
        "{}最重要的是安全，请不要勉强自己。",
        "可以和朋友一起{}，互相提醒更容易坚持。",
        "如果{}遇到困难，可以把它分成几个小步骤。",
        "{}时注意休息，太累了反而没有效果。",
    ),
    closings=("祝你顺利！", "希望对你有帮助。", "慢慢来，你可以做到。", "有问题可以再问我。"),
    careless=("随便吧。", "不知道。", "{}没有意思。", "你自己想办法。", "别问我{}的事。", "{}都是浪费时间。"),
    joint="",
)  # fmt: skip

ENGLISH = Language(
    topics=(
        "learn English", "run", "cook", "save money", "sleep early", "read more", "write well", "swim",
        "keep a cat", "grow flowers", "move house", "travel", "draw", "play the piano", "find a job",
        "save power", "relax", "climb hills", "ride a bike", "learn words", "clean my room",
        "help old people", "rest my eyes", "sort waste",
    ),
    questions=(
        "How do I {}?", "Is it hard to {}?", "Why should I {}?", "I do not want to {}.", "Is it good to {}?",
        "When should I {}?", "Tell me how to {}.", "Can I {} for free?",
    ),
    openings=("Thank you for asking.", "That is a good question.", "I am happy to help.", "Do not worry."),
    advice=(
        "To {}, start with a small goal and do a little every day.",
        "Before you {}, read about it and ask people who know it well.",
        "When you {}, stay safe and do not push yourself too hard.",
        "You can {} with a friend, which makes it easier to go on.",
        "If it is hard to {}, cut it into small steps.",
        "Take a rest when you {}, since you learn little when you are tired.",
    ),
    closings=("Good luck!", "I hope this helps.", "Take your time, you can do it.",
              "Ask me again if you like."),
    careless=("Who cares.", "I do not know.", "It is no fun to {}.", "Find out yourself.",
              "Do not ask me to {}.", "To {} is a waste of time."),
    joint=" ",
)  # fmt: skip


def demo_rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows in CValues' schema, the two languages in turn; prompts repeat only after all have been used."""
    languages = (CHINESE, ENGLISH)
    prompts = [list(product(language.topics, language.questions)) for language in languages]
    orders = [
        random_stream("demo prompts", seed, i).permutation(len(found)) for i, found in enumerate(prompts)
    ]
    for number in range(count):
        which, turn = number % 2, number // 2
        language, order = languages[which], orders[which]
        topic, question = prompts[which][order[turn % len(order)]]
        draw = random_stream("demo row", seed, number)
        first, second = draw.permutation(len(language.advice))[:2]
        answer = [
            language.openings[draw.integers(len(language.openings))],
            language.advice[first],
            *([language.advice[second]] if draw.random() < 0.3 else []),
            language.closings[draw.integers(len(language.closings))],
        ]
        yield {
            "prompt": question.format(topic),
            "pos_resp": language.joint.join(part.format(topic) for part in answer),
            "neg_resp": language.careless[draw.integers(len(language.careless))].format(topic),
            "pos_type": language.pos_types[draw.integers(len(language.pos_types))],
            "neg_type": language.neg_type,
        }
