"""Constants of FS-DINO (arXiv 2504.15669), each with its section, or "not stated" and why it was chosen."""

IMAGE_RES_PX = 518  # Sec. 4.1, few-shot training and test
DISTILL_RES_PX = (126, 252, 518)  # Sec. 3.3.2 and 4.1, coarse to fine
DISTILL_EPOCHS = 15  # Sec. 4.1, at each resolution
EARLY_LAYER = 3  # Sec. 2.1: DINOv2's 3rd layer is nearest to SAM's output embedding (block index 2)
BATCH_SIZE = 8  # Sec. 4.1, in all, for distillation and for episodes
LEARNING_RATE = 1e-3  # Sec. 4.1
DECODER_LEARNING_RATE = 1e-4  # not stated; HDMNet's code, which Sec. 4.1 follows, has this second group
WEIGHT_DECAY = 0.01  # not stated; HDMNet
POLY_POWER = 0.9  # not stated; HDMNet, per iteration, no warm-up
EPOCHS_PASCAL = 100  # Sec. 4.1

ADAPTER_WIDTHS = (256, 256, 128)  # Sec. 3.3.1: 1x1, 3x3, 1x1
ADAPTER_BLOCKS = 2  # Sec. 3.3.1
ADAPTER_FFN = 512  # Sec. 3.3.1
ADAPTER_HEADS = 8  # not stated; the structure of Vaswani et al. (ref. 30)
EMBEDDING_CHANNELS = 256  # Sec. 3.3.1, SAM's neck

CORRELATION_CHANNELS = 512  # Sec. 3.4.1, the first convolution 1369 -> 512
PRIOR_HEAD_WIDTHS = (256, 256)  # not stated; 361 -> 256 -> 256 -> 1 gives the "4M parameters" of Sec. 4.3
PRIOR_UPSCALE = 4  # Sec. 3.4.1, the prior mask is 4 times the grid
SIMILARITY_SCALE = 10.0  # not stated; a cosine of +-1 becomes a logit that a sigmoid can use

SAM_DECODER_DEPTH = 2  # segment-anything, build_sam.py
SAM_DECODER_HEADS = 8
SAM_DECODER_MLP = 2048
SAM_MASK_CHANNELS = 16  # hidden channels of SAM's mask_downscaling

MIN_CLASS_PIXELS = 2 * 32 * 32  # PFENet's rule: a class counts in an image from 2,048 labelled pixels
VOID = 255  # VOC's "ignore"
PASCAL_TRAIN_IMAGES = 5953  # PFENet's list: VOC's segmentation train and SBD's train without VOC's val
