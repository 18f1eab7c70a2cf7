"""How good are the explanations? Trains networks, runs all methods, writes the pages in docs/.

Every network's results are written to a file at once, so that a run that was cut short goes on
where it stopped::

    python scripts/evaluate.py                     # the reduced protocol
    python scripts/evaluate.py --full              # real sizes, more seeds: wants a GPU
    python scripts/evaluate.py --only resnet50     # a part
    python scripts/evaluate.py --write             # only draw and write what is stored

On networks that others trained, with your copies of pictures and weights::

    python scripts/evaluate.py --real --pictures FOLDER --weights FOLDER

`evaluation/real.py` says what lies in the folders; what is absent is left out.

On pictures and weights of your own, with the measures that need no object masks::

    python scripts/evaluate.py --images imagenette2/val --arch resnet50 --weights DEFAULT

The folder has one sub-folder for each class. What is explained is the true class if the network has
as many outputs as there are folders, and otherwise the class that it predicts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.driver import main

if __name__ == "__main__":
    main(__doc__)
