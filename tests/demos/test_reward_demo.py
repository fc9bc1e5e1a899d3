"""A reward model on the reversal task: it learns to tell a reversed number from one with a wrong digit."""

import random

from lightning_lm.modules import LearnedReward


def test_sixty_steps_teach_to_tell_right_from_wrong(run_demo):
    words = ("--trainer.max_steps", "60", "--trainer.val_check_interval", "60")
    demo = run_demo("reward/reverse", "reward_reverse", *words, answers=False)
    assert demo.curves["val/accuracy"][-1] >= 0.90
    numbers = held_out()
    right = [number[::-1] for number in numbers]
    rewards = [
        LearnedReward(checkpoint=str(demo.checkpoint))(
            prompts=[f"{number}=" for number in numbers], completions=answers
        )
        for answers in (right, [spoiled(answer) for answer in right])
    ]
    won = [good > bad for good, bad in zip(*rewards, strict=True)]
    assert sum(won) / len(won) >= 0.90


def held_out(count: int = 500) -> list[str]:
    """Numbers that no recipe trains on."""
    generator, found = random.Random(8), []
    while len(found) < count:
        number = "".join(generator.choices("0123456789", k=5))
        if number != number[::-1] and random.Random(number).random() < 0.1:
            found.append(number)
    return found


def spoiled(answer: str) -> str:
    """Change one digit."""
    place = sum(map(int, answer)) % 5
    return f"{answer[:place]}{(int(answer[place]) + 3) % 10}{answer[place + 1 :]}"
