"""Answers that look right and are not, and right ones that look odd; each was once judged the other way round."""

from __future__ import annotations

import pytest

from megatron_prorl.tasks import verify
from megatron_prorl.types import Problem


def score(domain: str, gold: str, answer: str, question: str = "What is it?") -> float:
    messages = [{"role": "user", "content": question}]
    verification = {"answer": gold}
    problem = Problem(
        id="p", domain=domain, task="t", messages=messages, verification=verification, source="test"
    )  # fmt: skip
    return verify(problem, rf"So it is \boxed{{{answer}}}.").score


CASE = [  # gold, accepted, rejected: x and X are two variables
    ("a", ["a"], ["A"]),
    ("X", [], ["x"]),
    ("2a", ["a+a"], ["2A"]),
    (r"\frac{M}{m}", ["M/m"], ["m/M", "m/m", "M/M", "1"]),
    ("mR^2", ["R^2m"], ["Mr^2", "mr^2"]),
    ("e^{-x}", [r"\frac{1}{e^x}", r"\exp(-x)"], ["E^{-x}", "e^{-X}"]),
    ("e", ["e"], ["E"]),
    ("x^2+1", ["1+x^2"], ["X^2+1"]),
    ("y=2x+1", ["2x+1"], ["y=2X+1"]),
    (r"\Delta", ["Δ"], [r"\delta"]),
    (r"\gamma", [], [r"\Gamma"]),
    (r"\frac{\Delta x}{\Delta t}", [r"\Delta x/\Delta t"], ["x/t", r"\frac{\delta x}{\delta t}"]),
    ("S_n", ["S_{n}"], ["s_n", "S_N"]),
    ("ab", ["ba"], ["AB", "aB"]),
    ("AB", ["AB"], ["ab", "BA"]),
    (r"x^2+C", ["x^2+c", "C+x^2"], ["X^2+C", "x^2+K"]),
    (r"\text{Yes}", ["YES", "yes"], ["no"]),
    (r"\text{no}", ["No", "NO"], ["on", "yes"]),
]
LEFT_OPEN = [
    ("2", ["2"], [r"2\ldots", "1..3"]),
    (r"120^\circ", [r"120^{\circ}"], ["120'", r"120^\prime"]),
    (r"\frac{n(n+1)}{2}", [r"\frac{n^2+n}{2}"], [r"1+2+\cdots+n"]),
    ("2x", ["x+x"], [r"\frac{d}{dx}x^2"]),
    ("(3,4)", ["(3, 4)"], ["{3,4}"]),
    (r"\{3,4\}", ["{3,4}"], ["(3,4)"]),
    ("x = 3", ["3", "x=3", "3=x"], ["x-3=0", "2x=6"]),
    ("x+y=1", ["y=1-x", "x+y-1=0"], ["1", "x+y"]),
    ("y=x", ["x=y"], ["y=-x", "x=x"]),
    ("12:30", ["12:30"], ["6:15", "2/5"]),
    ("3:05", ["3:05"], ["6:10"]),
    (r"3\text{ m}", [r"300\text{ cm} = 3\text{ m}"], [r"5\text{ m} = 3\text{ m}"]),
    ("A", ["A"], ["A'", r"A^\prime"]),
    (r"\angle ABC", [r"\angle ABC", r"\angle CBA"], [r"\angle ACB", r"\angle abc"]),
    (r"\overline{AB}", ["AB"], ["BC", r"\overline{AC}"]),
    (r"\text{6 feet}", ["6", "72 inches"], ["6 inches", r"\text{6 or 7 feet}"]),
    ("y'=2x", ["y'=2x", "2x"], []),
    ("f'(x)=2x", ["f'(x)=2x", "2x"], ["f(x)=2x"]),
    ("x>3", ["3<x"], ["x>3_5"]),
]
NOTATION = [
    (r"(-\infty,2)\cup(3,\infty)", [r"x<2 \text{ or } x>3", r"x>3 \text{ or } x<2"],
     [r"x<2", r"x<2 \text{ or } x\ge3", r"x>2 \text{ or } x<3"]),
    (r"x<2 \text{ or } x>3", [r"(-\infty,2)\cup(3,\infty)"], [r"(-\infty,2)", "(2,3)"]),
    ("2 < x < 5", ["5>x>2", "(2,5)"], [r"5\ge x\ge 2"]),
    (r"\ln 2", [r"\log_e 2", r"\log_{e}2", "ln 2", "ln(2)"], [r"\log_{10}2"]),
    ("sin x", [r"\sin x", r"\sin(x)"], [r"\cos x"]),
    ("2pi", [r"2\pi", "2π"], ["2p", r"\pi"]),
    (r"\sqrt{13}", ["13^{0.5}", "13^.5"], ["13^{5}"]),
    ("x^2", ["x²"], ["x³", "x2"]),
    ("3 x 10^-4", [r"3\times10^{-4}", "3e-4", "0.0003"], ["3", r"3\times10^{4}"]),
]  # fmt: skip
MATH = [*CASE, *LEFT_OPEN, *NOTATION]

MOLAR = ["8.314 J/(mol K)", "8.314 J/mol K", "8.314 J/mol/K", "8.314 J mol^-1 K^-1", r"8.314\,\mathrm{J/mol\cdot K}",
         "8.314 J/K mol", "8.314 J/mol K^-1", r"8.314 \frac{\text{J}}{\text{mol}\cdot\text{K}}"]  # fmt: skip
STEM = [
    *((gold, [*MOLAR, "0.008314 kJ/mol K"], ["8.314 J/mol", "8.314 J K/mol", "8.314 kJ/mol K"]) for gold in MOLAR),
    ("5 W/m^2 K", ["5 W/(m^2 K)", "5 W m^{-2} K^{-1}", "5 W/m²·K"], ["5 W/m^2", "5 W K/m^2"]),
    ("4.18 J/g °C", ["4.18 J/(g K)", "4.18 J/(g·°C)", "4180 J/kg K"], ["4.18 J/g"]),
    ("0.0821 L atm/mol K", [r"0.0821\ \mathrm{L\,atm\,mol^{-1}\,K^{-1}}"], ["0.0821 L atm"]),
    ("9.8 m/s^2", [r"9.8 \frac{m}{s^2}", "9.8 m/(s^2)", "9.8 ms^{-2}", "9.8 m s⁻²"], ["9.8 m/s", r"9.8 \frac{s^2}{m}"]),
    ("3.0 × 10⁸ m/s", ["3e8 m/s", "3.0 x 10^8 m/s"], ["3e7 m/s"]),
    ("1.6 x 10^-19 C", [r"1.6 \times 10^{-19} C", "1.6e-19"], ["1.6e-19 J", "1.6", "1.6e19"]),
    ("5 N·m", ["5 Nm", "5 J"], ["5 N"]),
    ("pH 7", ["7", "pH = 7"], ["8", "pH 8"]),
    ("25 °C", ["298.15 K"], ["25 K"]),
    ("Fe2O3", [r"\ce{Fe2O3}", "Fe₂O₃"], ["Fe3O2"]),
    ("Co", ["Co"], ["CO"]),
    ("3 m", ["x = 3 m", r"\Delta x = 3\text{ m}", "n_1/n_2 = 3", "300 cm = 3 m"], ["5 m or x = 3 m", "5, x = 3 m"]),
    ("3 m", ["3 m"], ["5 = 3 m", "5 m = 3 m", r"5\text{ m} = 3\text{ m}"]),
    ("k", ["k"], ["K"]),
    ("mv^2/R", [r"\frac{mv^2}{R}"], [r"\frac{mv^2}{r}", r"\frac{mV^2}{R}"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("domain", "gold", "answer"),
    [
        (domain, gold, one)
        for domain, rows in (("math", MATH), ("stem", STEM))
        for gold, ones, _ in rows
        for one in ones
    ],
)
def test_a_right_answer_that_looks_odd_is_correct(domain: str, gold: str, answer: str):
    assert score(domain, gold, answer) == 1.0


@pytest.mark.parametrize(
    ("domain", "gold", "answer"),
    [
        (domain, gold, one)
        for domain, rows in (("math", MATH), ("stem", STEM))
        for gold, _, ones in rows
        for one in ones
    ],
)
def test_a_wrong_answer_that_looks_right_scores_nothing(domain: str, gold: str, answer: str):
    assert score(domain, gold, answer) == 0.0


@pytest.mark.parametrize(
    ("question", "gold", "accepted", "rejected"),
    [
        ("Expand $(x+1)^2$.", "x^2+2x+1", ["1+2x+x^2"], ["(1+x)^2", "(x+1)(x+1)", r"(1+x)\cdot(x+1)"]),
        ("Factor $x^2+2x+1$.", "(x+1)^2", ["(1+x)^2", "(x+1)(x+1)"], ["1+2x+x^2", "x^2+x+x+1"]),
        (r"Rationalise $\frac{2}{\sqrt{3}+1}$.", r"\sqrt{3}-1", [r"-1+\sqrt3"],
         [r"\frac{2}{1+\sqrt{3}}", r"2/(\sqrt3+1)"]),
        (r"Find \(\arcsin(1/2)\).", r"\frac{\pi}{6}", [r"\pi/6"], [r"\sin^{-1}\frac12"]),
        ("Which of $x+12$ and $x+1$ is it?", "1+x", ["x+1"], []),
        ("Expand $2(x+1)$.", "2x+2", ["2+2x"], []),
        ("What percent of 8 is 2?", "25", ["25", r"25\%"], [r"\frac{1}{4}", "0.25"]),
        ("Compute $12+30$.", "42", ["42", "x=42"], ["30+12", r"\frac{84}{2}"]),
    ],
)  # fmt: skip
def test_the_question_in_another_order_is_no_answer(question: str, gold: str, accepted: list[str], rejected: list[str]):
    assert [score("math", gold, answer, question) for answer in accepted] == [1.0] * len(accepted)
    assert [score("math", gold, answer, question) for answer in rejected] == [0.0] * len(rejected)
