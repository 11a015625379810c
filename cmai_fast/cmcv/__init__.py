"""Cross-modal consistency verification: does the image agree with the question and its answer?"""

from cmai_fast.cmcv.calibration import Threshold, calibrate
from cmai_fast.cmcv.heads import ConsistencyHeads
from cmai_fast.cmcv.loss import contrastive_loss, packed_text, text_groups
from cmai_fast.cmcv.verifier import Verifier

__all__ = ["ConsistencyHeads", "Threshold", "Verifier", "calibrate", "contrastive_loss", "packed_text", "text_groups"]
