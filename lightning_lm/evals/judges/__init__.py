"""Learned judges: win rates, grades and ratings of models by another language model, and its agreement with people."""

from lightning_lm.evals.judges.agreement import AgreementResult, cohens_kappa, compare_with_people
from lightning_lm.evals.judges.answering import answer_questions, save_answers
from lightning_lm.evals.judges.bradley_terry import Battle, BradleyTerry, Rating, fit_bradley_terry
from lightning_lm.evals.judges.chats import ChatModel, LikelihoodChat, LocalChat, Reply, ServerChat
from lightning_lm.evals.judges.exchanges import AnswerSet, Exchange, Question, load_answers, load_questions
from lightning_lm.evals.judges.grading import AnswerGrade, GradingResult, grade_answers
from lightning_lm.evals.judges.judge import Judge, Judgement, Prices, Usage
from lightning_lm.evals.judges.labels import LabelledPair, load_labels
from lightning_lm.evals.judges.length_control import LengthControl, length_controlled_win_rate
from lightning_lm.evals.judges.pairwise import PairVerdict, PairwiseResult, PositionBias, compare_answers
from lightning_lm.evals.judges.ranking import Ranking, rank_answers

__all__ = [
    "AgreementResult",
    "AnswerGrade",
    "AnswerSet",
    "Battle",
    "BradleyTerry",
    "ChatModel",
    "Exchange",
    "GradingResult",
    "Judge",
    "Judgement",
    "LabelledPair",
    "LengthControl",
    "LikelihoodChat",
    "LocalChat",
    "PairVerdict",
    "PairwiseResult",
    "PositionBias",
    "Prices",
    "Question",
    "Ranking",
    "Rating",
    "Reply",
    "ServerChat",
    "Usage",
    "answer_questions",
    "cohens_kappa",
    "compare_answers",
    "compare_with_people",
    "fit_bradley_terry",
    "grade_answers",
    "length_controlled_win_rate",
    "load_answers",
    "load_labels",
    "load_questions",
    "rank_answers",
    "save_answers",
]
