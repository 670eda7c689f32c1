r"""How answers and ground truths are written: in every family the right value passes, and its near miss does not."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import Sample, Verdict
from reward.math.answer import math_answer
from reward.math.text import compare, tidy

NUMBERS = [14, 8, 120, 1250, 11111, 1234567, -3, 0.5, 2.25, 0.00001, 29.5]
"""Values that take every notation; the near misses are 1 % off, so that no rounding hides them."""


def notations(value: float) -> Iterator[str]:
    """What a model or a data set may write for a number."""
    plain = f"{value:.10f}".rstrip("0").rstrip(".")
    mantissa, exponent = f"{value:.12e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    yield from (
        plain,
        f" {plain} ",
        f"{plain}.",
        f"${plain}$",
        rf"\({plain}\)",
        rf"\ {plain}",
        rf"{plain}\ ",
        rf"{plain}\,",
    )
    yield from (rf"\text{{{plain}}}", rf"\mathbf{{{plain}}}", rf"\textbf{{{plain}}}", f"**{plain}**", f"{{{plain}}}")
    yield from (rf"= {plain}", rf"\approx {plain}", f"x = {plain}", rf"m_{{\max}} = {plain}", rf"\boxed{{{plain}}}")
    yield from (repr(value), f"{mantissa}e{exponent}", f"{mantissa}E{int(exponent)}")
    yield from (rf"{mantissa} \times 10^{{{int(exponent)}}}", rf"{mantissa}\cdot 10^{{{int(exponent)}}}")
    yield from (
        f"{plain} apples",
        f"{plain} (coats)",
        rf"{plain}\text{{ cm}}",
        rf"{plain}\ \mathrm{{cm}}^2",
        f"{plain} km/h",
    )
    yield from (rf"\${plain}", rf"{plain}^\circ", rf"{plain} \text{{ degrees}}")
    if abs(value) >= 1000:
        grouped = f"{value:,}"
        for separator in (",", " ", r"\ ", r"\,", "{,}", r",\!", r",\! ", "~", "\N{NARROW NO-BREAK SPACE}"):
            yield grouped.replace(",", separator)


@pytest.mark.parametrize("value", NUMBERS)
def test_a_number_is_itself_in_every_notation_and_no_other(value: float) -> None:
    gold = f"{value:.10f}".rstrip("0").rstrip(".")
    for right, miss in zip(notations(value), notations(value * 1.01), strict=False):
        assert compare(tidy(gold), tidy(right)) is not False, right
        assert judged(gold, right), right
        assert judged(right, gold), f"{right} as the ground truth"
        assert not judged(gold, miss), miss
        assert not judged(miss, gold), f"{miss} as the ground truth"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**9), st.integers(-300, 300))
def test_the_size_of_a_number_hides_no_difference(digits: int, exponent: int) -> None:
    for gold, answer, equal in (
        (rf"{digits}\times 10^{{{exponent}}}", f"{digits}e{exponent}", True),
        (rf"{digits}\times 10^{{{exponent}}}", f"{digits + 1}e{exponent}", False),
        (rf"{digits}\times 10^{{{exponent}}}", f"{digits}e{exponent - 1}", False),
        (rf"{digits}\times 10^{{{exponent}}}", "0", False),
    ):
        assert compare(tidy(gold), tidy(answer)) is equal, (gold, answer)


FAMILIES = {
    "tiny values of algebra": [
        (r"\frac{1}{52!}", r"\frac{1}{52\cdot 51!}", r"\frac{1}{51!}"),
        (r"\frac{1}{1999!}", r"\frac{2000}{2000!}", r"\frac{1}{2001!}"),
        (r"\left(\frac16\right)^{20}", r"6^{-20}", r"6^{-21}"),
        (r"1-e^{-40}", r"\frac{e^{40}-1}{e^{40}}", "1"),
        (r"\sqrt{2}\cdot 10^{-20}", r"\frac{\sqrt2}{10^{20}}", r"\sqrt{3}\cdot 10^{-20}"),
        (r"(10^{-13}, 1)", r"(0.0000000000001, 1)", "(0, 1)"),
        (r"\{10^{-13}\pi, 1\}", r"1, \frac{\pi}{10^{13}}", "0, 1"),
        (r"[0, 10^{-13}\pi]", r"[0, \frac{\pi}{10^{13}}]", "[0, 0]"),
        (
            r"\begin{pmatrix}10^{-13}\\2\end{pmatrix}",
            r"\begin{bmatrix}\frac{1}{10^{13}}\\2\end{bmatrix}",
            r"\begin{pmatrix}0\\2\end{pmatrix}",
        ),
        (r"10^{-13}x", r"\frac{x}{10^{13}}", r"2\cdot 10^{-13}x"),
        (r"2^{200}", r"4^{100}", r"2^{200}+1"),
    ],
    "rounded": [
        (r"\frac13", "0.333333", "0.333334"),
        (r"\sqrt2", "1.414214", "1.414215"),
        ("33.333333333333336", r"\frac{100}{3}", "33.34"),
        ("0.30000000000000004", "0.3", "0.3000001"),
    ],
    "units and words of the ground truth": [
        ("2 (coats)", "2", "3"),
        ("60 (km/h)", r"60\ \text{km/h}", "6"),
        ("18 years", "18", "81"),
        (r"\frac{3}{4} \text{ cup}", "0.75", "0.34"),
        ("5.4 cents", "5.4", "5"),
        (r"5 \text{ cm}", "5 cm", "5 m"),
        ("5 p.m.", "5 PM", "5 AM"),
        (r"9 \text{ cm}^2", "9 cm^2", "9 cm^3"),
        ("5", "5th", "6th"),
        ("10:00", "10:00", "-10:00"),
        ("10:30", r"10:30 \text{ a.m.}", "11:30"),
        ("10:30 AM", "10:30 a.m.", "10:30 PM"),
        ("1200000", r"1.2 \text{ million}", "1.2 billion"),
        (r"25\%", "25", "2.5"),
        (r"10\pi \text{ cm}^2", r"10\pi", r"10 \text{ cm}^2"),
        (r"\text{20 apples}", "20", "2"),
        (r"15", r"15\ \frac{\text{km}}{\text{h}}", r"15\frac{2}{3}"),
        ("500", "₹500", "₹50"),
        ("500", "¥500", "¥50"),
        ("25 cents", "25¢", "25 dollars"),
    ],
    "decimal commas of LaTeX": [
        ("0.5", "0{,}5", "5"),
        ("7{,}5", "7.5", "75"),
        ("0.125", "0{,}125", "125"),
        ("1000", "1{,}000", "1"),
        ("1234567", "1{,}234{,}567", "1.234567"),
        ("1, 2, 3", "1{,}2{,}3", "1.2, 3"),
    ],
    "letters that are no units": [
        ("5t", "5 t", "5"),
        ("3s", r"3 \cdot s", "3g"),
        ("4ab", "4ba", "4"),
        ("12x", r"12 \cdot x", "12"),
        ("R^2-r^2", "(R-r)(R+r)", "0"),
        ("x'", "x'", "x"),
        ("5", "5 m", "5m"),
        ("58", "58 apples", "58 squared"),
        ("58", "58 miles", "58 more than 3"),
        ("2", "2 quarts", "2 thirds"),
        ("5", r"5 \text{ times}", r"5 \text{ times two}"),
        ("3", "3 times a week", "3 times x squared"),
        ("2", r"2 \text{ left over}", "2 over x"),
        ("3", r"3 \text{ hours to go}", "3 to one"),
        ("2", r"2 \text{ left over}", r"2\text{ over 3}"),
        ("2", "2 boxes left over", "2 over xy"),
        ("2", "2 quarts", "2 over fifteen"),
        ("5", r"5 \text{ times as many}", r"5\text{ times 10}"),
        ("5", "5 times per day", "5 times itself"),
        ("5", "5 times each week", "5 times thirteen"),
        ("5", "5 times", "5 times theta"),
        ("x+1", "1+x", r"(x+1)\text{ all squared}"),
        (r"5\text{ m}^2/\text{s}", "5", "5 meters squared per second"),
        ("5 m/s^2", "5 meters per second squared", "5 meters per second cubed"),
        ("3 hours", "3 hours to go", "3 minutes to go"),
        ("3 times a week", "3 times per week", "3 times a day"),
        ("5 times", "5", "5 times squared"),
        (r"36 \text{ cm}^2", "36 cm squared", "36 cm cubed"),
        ("27", r"27 \text{ units cubed}", r"27 \text{ cubed}"),
    ],
    "constants": [
        (r"\mathrm{e}^2", "e^2", r"\mathrm{e}^3"),
        (r"3+2\mathrm{i}", "2i+3", r"3-2\mathrm{i}"),
        (r"\mathrm{i}", r"\sqrt{-1}", "1"),
        ("1e-3", "0.001", "e-3"),
        ("3e - 2", "-2 + 3e", "0.03"),
        ("2e-1", "0.2", "0.02"),
        ("2e-1", "-1+2e", "-1+3e"),
        ("2e - 1", "2e-1", "3e-1"),
        ("5e-3", r"\frac{5}{10^3}", r"\frac{5}{10^4}"),
        ("5e+3", r"\frac{5}{10^{-3}}", r"\frac{0.05}{10}"),
        (r"\frac{1}{2\times10^2}", "5e-3", "5e-4"),
        ("5e-3", "-3+5e", "-4+5e"),
    ],
    "bases": [
        ("10", "10_{10}", "10_2"),
        ("10_{2}", "10_2", "10"),
        ("1011_2", r"1011_{\text{two}}", "1011_3"),
        ("A5_{16}", "A5_{16}", "A6_{16}"),
    ],
    "sets and intervals": [
        (r"\{x \mid x \geq 0\}", r"[0, \infty)", r"(0, \infty)"),
        (r"\{x : -1 \le x < 3\}", "[-1, 3)", "[-1, 3]"),
        (r"(-\infty,-1)\cup(4,\infty)", r"x<-1 \text{ or } x>4", "-1<x<4"),
        ("1<x<4", r"x>1 \text{ and } x<4", r"x>1 \text{ or } x<4"),
        (r"\mathbb{R}", r"\text{all real numbers}", r"[0,\infty)"),
        (r"x \neq 2", r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}"),
        (r"\emptyset", r"\text{no solution}", "0"),
        ("2x>4", "x>2", "x<2"),
        ("x>2", "2<x", "t<2"),
        (r"x \in [-2,7]", "[-2,7]", "(-2,7)"),
    ],
    "lists": [
        (r"14, 33, \text{ and } 71", "71, 14 and 33", "17, 23, and 71"),
        ("n=3, 5, 9", "3, 5, 9", "n=3, 5, 7"),
        ("1,2,2", "2,1,2", "1,1,2"),
        ("(1,2),(3,4)", "(3,4),(1,2)", "(2,1),(3,4)"),
        ("11111", r"11,\! 111", "11, 111"),
        ("100, 200", "200, 100", "100, 20"),
        ("1,234, 5,678", "5678, 1234", "1234"),
        (r"\pm 10^{-13}", r"-10^{-13}, 10^{-13}", r"\pm 10^{-14}"),
        (r"\frac{-1\pm\sqrt5}{2}", r"\frac{\sqrt5-1}{2}, \frac{-\sqrt5-1}{2}", r"\frac{-1\pm\sqrt3}{2}"),
        (r"\text{Anna and Ben}", "Ben and Anna", "Anna"),
        (r"\text{(B), (C)}", "C, B", "B"),
        ("1:2:3:\\ldots", "1:2:3:\\dots", "1:4:9:\\ldots"),
    ],
    "names": [
        ("(3,4)", "y=4, x=3", "x=4, y=3"),
        ("a=2, b=5", "b=5, a=2", "a=5, b=2"),
        ("3, -1", "x_1=-1, x_2=3", "x_1=-1, x_2=2"),
        ("2, 5", "r=2, h=5", "r=2, h=6"),
        ("3, 4", "x=3, y=4", "x=4, y=3"),
        ("3, 4", "y=4, x=3", "y=3, x=4"),
        ("4, 3", "y=3, x=4", "x=3, y=4"),
        ("a_1=1, a_2=4", "a_2=4, a_1=1", "a_3=4, a_7=1"),
        ("a_1=1, a_2=4", "a=4, a=1", "a_3=1, a_7=4"),
        ("x=1, y=2", "x_1=1, y_1=2", "x_1=1, x_2=2"),
        ("r=2, h=5", "2, 5", "5, 3"),
        ("30, 60", r"\alpha=30, \beta=60", r"\beta=30, \alpha=60"),
        ("3, 5", "f(1)=3, f(2)=5", "f(2)=3, f(1)=5"),
        (r"30^\circ, 60^\circ", r"\angle A=30^\circ, \angle B=60^\circ", r"\angle B=30^\circ, \angle A=60^\circ"),
        ("2, 5", "x=2, z=5", "z=2, x=5"),
        ("x_1=1, x_2=2, x_3=3", "1, 2, 3", "3, 2, 1"),
        ("1, 4", "a_1=1, a_2=4", "a_1=4, a_2=1"),
        ("y=2, x=1", "1, 2", "1, 3"),
        ("x=1, y=2", "1, 2", "2, 1"),
        ("x_1=1, x_2=2", "2, 1", "2, 2"),
        (r"x=-1 \text{ or } x=3", "x_1=3, x_2=-1", "y_1=3, y_2=-1"),
        ("(-1,3)", "x_1=-1, x_2=3", "x_1=3, x_2=-1"),
        ("x_1=-1, x_2=3", "x_2=3, x_1=-1", "x_1=3, x_2=-1"),
        (r"\frac12", r"\cos A = \frac12", r"\cos 2A = \frac12"),
        ("5", "|z| = 5", "-|z| = 5"),
        ("5", r"|\vec{v}| = 5", "|x| = 5"),
        (r"\sqrt{5}", r"|z_1| = \sqrt5", r"\sqrt{x} = \sqrt5"),
        ("5", r"\tan(A+B) = 5", r"\ln x = 5"),
        ("5", r"\tan \angle ABC = 5", r"\log_2 x = 5"),
        (r"\frac12", r"\sin\theta = \frac12", r"\sin x = \frac12"),
        (r"\tan\alpha", r"\tan\alpha = \frac{AB}{BC}", r"\cot\alpha = \frac{AB}{BC}"),
        (r"\sin\theta", r"\sin\theta = \sin\theta", r"\cos\theta = \sin\theta"),
        ("5", r"\mathbf{a}\cdot\mathbf{b} = 5", r"\mathbf{a}\cdot\mathbf{b} = 6 = 5"),
        (r"\vec{a}\cdot\vec{b} = 5", "5", "6"),
        ("5", r"\tan\theta = 5", r"\tan\pi = 5"),
        (r"m_{\max}=5", "5", r"m_{\min}=5"),
        ("5", r"\text{Area} = 5", r"\text{Area} = 6"),
        ("14", r"N = 2\cdot 7 = 14", r"N = 2\cdot 8 = 14"),
        ("14", "x+y+z = 14", "x+2 = 14"),
        (r"\frac17", r"\frac17 \approx 0.143", r"0.143"),
        ("2", "x = 2", "-x = 2"),
        ("x^2=y", "y=x^2", "x^2=yx"),
        ("14", "13.6 + 0.4 = 14", r"14 \approx 15"),
        (r"x\equiv 7\pmod{10}", r"x \equiv 7 \pmod{10}", r"x \equiv 7 \pmod{12}"),
        (r"f(x)=x^2 \text{ for all } x>0", "x^2", r"f(x)=x^3 \text{ for all } x>0"),
        (r"S_n = \sum_{k=0}^{n} k^2", r"\frac{n(n+1)(2n+1)}{6}", r"S_n = \sum_{k=0}^{n-1} k^2"),
    ],
    "lines": [
        ("2x+4y-6=0", r"y=-\frac12 x+\frac32", r"y=-\frac12 x-\frac32"),
        ("y=2x+1", "2x-y=-1", "2x-y=1"),
        ("2x+3y=6", "4x+6y=12", "4x+6y=6"),
    ],
    "arbitrary constants": [
        (r"\frac{\pi}{6}+2k\pi", r"\frac{\pi}{6}+2n\pi", r"\frac{\pi}{6}+n\pi"),
        (r"x=2k\pi, k\in\mathbb{Z}", r"2n\pi", r"n\pi"),
        ("x^2+C", "x^2+c", "x^2"),
        ("2k", "k+k", "2n"),
        (r"2k\pi", r"2n\pi\ (n \in \mathbb{Z})", r"2n\pi\ (n \in \mathbb{Z}), 7"),
    ],
    "choices": [
        ("B", "B. 12", "A. 12"),
        ("B", "Option B", "Option C"),
        ("B", r"\text{B: } 12", "B or C"),
        ("B", "(B) 12", "(A) or (B)"),
        (r"\textbf{(B) } 12", "B", "C"),
        (r"\textbf{(B)}\ 12", r"\text{(B)}", r"\text{(A)}"),
        ("B", "(B).", r"(B)\text{ or }7"),
        ("24", r"\textbf{(C) }24", r"\textbf{(C) }25"),
        ("B", r"\text{(B) It does not change}", r"\text{(B) is wrong, it is C}"),
        ("B", r"\text{(B) Not enough information}", "(B) not"),
        ("C", r"\text{(C) I and II only}", "(C) and (B)"),
        ("B", "B. A triangle", "B. A"),
        (r"\text{(B) It does not change}", "B", "(B) if x > 0"),
        ("B", r"\text{(B) is odd}", "(B) Not it"),
        ("B", "B. I and II only", "B. I"),
        (r"\text{(B) is odd}", "B", "C"),
        (r"\text{(D) never}", "D", "A"),
        (r"\text{(C) Both statements are incorrect}", "C", "B"),
        ("C", r"\text{(C) A rhombus, not a square}", r"\text{(C) No, A fits}"),
    ],
    "what no parser reads": [
        ("①③", "①③", "①④"),
        (r"\text{第二象限}", r"\text{第二象限}", r"\text{第一象限}"),
        (r"a \oplus b \otimes 2", r"a \oplus b\otimes 2", r"a \oplus b \otimes 3"),
    ],
}


def judged(gold: str, answer: str) -> bool:
    """Whether the answer passes. Fails where nobody could judge it."""
    score = math_answer([Sample("s", "?", rf"So it is \boxed{{{answer}}}.", gold)])[0]
    assert score.verdict in (Verdict.PASS, Verdict.WRONG), (gold, answer, score)
    return score.verdict is Verdict.PASS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_one_passes_and_its_near_miss_does_not(family: str) -> None:
    for gold, right, miss in FAMILIES[family]:
        assert judged(gold, gold), f"{gold} letter by letter"
        assert judged(gold, right), (gold, right)
        assert not judged(gold, miss), (gold, miss)


STATED = [
    ("58", r"<think>\boxed{57}</think> \boxed{58}", r"<think>\boxed{58}</think> \boxed{57}"),
    ("58", r"no \boxed{57}</think> \boxed{58}", r"\boxed{58}</think> \boxed{57}"),
    ("58", r"\boxed{58}", r"<think>\boxed{58}"),
    ("58", "<think>57</think><answer>58</answer>", "<think>58</think><answer>57</answer>"),
    ("14", r"a=\boxed{3}, b=\boxed{11}, so \boxed{14}", r"a=\boxed{3}, b=\boxed{14}, so \boxed{17}"),
    ("1, 2", r"\boxed{1} and \boxed{2}", r"\boxed{1} and \boxed{3}"),
    ("2", r"\boxed{1}. Wait, no: \boxed{2}.", r"\boxed{1} or \boxed{2}"),
    ("2", r"\boxed{x=2}, so \boxed{2}", " ".join(rf"\boxed{{{n}}}" for n in range(100))),
    ("2", r"\boxed{2} and again \boxed{2.0}", r"It is \boxed{2}. Or maybe it is \boxed{1}."),
    ("(3,4)", r"x=\boxed{3}, y=\boxed{4}", r"x=\boxed{4}, y=\boxed{3}"),
    ("8", r"put 4 in the \boxed{\phantom{2}}: \boxed{8}", r"put 8 in the \boxed{\phantom{2}}: \boxed{4}"),
    ("8", r"\boxed{8}, as I put in \boxed{}", r"\boxed{8}, or \boxed{9"),
    ("8", r"$\boxed 8$", r"$\boxed 9$"),
    ("8", r"\fbox{8}", r"\fbox{8} \fbox{9}"),
    ("58", "Final Answer: 58", "Final Answer: 57"),
    ("58", "### Final Answer\n\n**58**", "### Final Answer\n\n**57**"),
    ("58", "**Answer:** 58", "**Answer:** 58 or 59"),
    (
        "58",
        "Final Answer: The final answer is $58$. I hope it is correct.",
        "Final Answer: The final answer is $57$. 58",
    ),
    ("58", "Answer: the correct answer is 58.", "Answer: 57. The correct answer is 58."),
    ("58", "The final answer is:\n\n58", "The final answer is:\n\n57\n\n58"),
    ("58", "The answer is\n\n$$58$$", "The answer is not clear yet.\n\n$$58$$"),
    ("58", "So the answer is:\n\\[\n58\n\\]", "So the answer is:\n\\[\n57\n\\]"),
    ("58", "Answer:\nWe add 29 and 29. The answer is 58.", "Answer:\nWe add 29 and 29. The answer is 57."),
    ("58", "## Answer\n\n58", "## Answer\n\n57"),
    ("58", "**Final Answer**\n$$\n58\n$$", "**Final Answer**\n$$\n57\n$$"),
    ("58", "#### Answer: 58", "#### Answer: 57"),
    ("58", "#### The final answer is 58", "#### The final answer is 57"),
    ("58", "#### The answer is: 58", "#### The answer is: 57"),
    ("58", "#### Answer is 58", "#### Answer is not 58"),
    ("58", "#### Final Answer\n\n58", "#### Final Answer\n\n57"),
    ("58", "The answer is indeed 58.", "The answer is indeed 57."),
    ("14", "The correct answer is **14**!", "The correct answer is $14!$"),
    ("14", "The answer is 14 because 3 + 11 = 14.", "The answer is 15 because 14 + 1 = 15."),
    (
        "14",
        "If the answer is 12, it fails. So the answer is 14.",
        "If the answer is 14, it fails. So the answer is 12.",
    ),
    ("14", "The answer is not 12. The answer is 14.", "The answer is 12. The answer is 14."),
    ("B", "Answer: (B) is correct.", "Answer: (B) is not correct."),
    ("B", "The correct answer is B) 12.", "The correct answer is A) 12."),
    ("3, 5", "The answer is 3, 5.", "The answer is 3."),
]


@pytest.mark.parametrize(("gold", "right", "miss"), STATED)
def test_what_is_stated_counts_and_what_is_only_mentioned_does_not(gold: str, right: str, miss: str) -> None:
    scores = math_answer([Sample("s", "?", completion, gold) for completion in (right, miss)])
    assert scores[0].verdict is Verdict.PASS, scores[0]
    assert scores[1].verdict in (Verdict.WRONG, Verdict.NO_ANSWER), scores[1]
