"""How good are the explanations? Relative LRP against other methods; see docs/evaluation.md.

``protocol.py`` fixes what is compared before anything is run; ``scripts/evaluate.py`` runs it.
"""
