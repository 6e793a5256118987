"""The lazy names of `cgm`, for type checkers."""

from cgkernels import __version__ as __version__
from cgm.checkpoints import load_model as load_model
from cgm.checkpoints import sampling_preset as sampling_preset
from cgm.checkpoints import save_model as save_model
from cgm.checkpoints import shipped as shipped
from cgm.checkpoints import shipped_names as shipped_names
from cgm.data import load_folder as load_folder
from cgm.data import load_task as load_task
from cgm.families.autoregressive import ConditionalTransformer as ConditionalTransformer
from cgm.families.cyclegan import CycleGAN as CycleGAN
from cgm.families.diffusion import ConditionalDiffusion as ConditionalDiffusion
from cgm.families.energy import ConditionalEBM as ConditionalEBM
from cgm.families.flow import ConditionalFlow as ConditionalFlow
from cgm.families.gan import ConditionalGAN as ConditionalGAN
from cgm.families.gan import Pix2Pix as Pix2Pix
from cgm.families.quantized_classifier import QuantizedClassifier as QuantizedClassifier
from cgm.families.regression import GaussianRegression as GaussianRegression
from cgm.families.regression import LeastSquares as LeastSquares
from cgm.families.regression import MixtureDensity as MixtureDensity
from cgm.families.vae import Autoencoder as Autoencoder
from cgm.families.vae import ConditionalVAE as ConditionalVAE
from cgm.model import make_model as make_model
from cgm.training import TrainingConfig as TrainingConfig
from cgm.training import train as train
