"""Arguments of any type and value: either they mean something, or they are refused in words before the pipeline runs."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own import STDiT2
from pipelines import dit, sd3
from replay import plan as uniform_plan
from subjects_path import subject
from untouched import left_as_it_was, parts

import arrowhead as ah
from arrowhead.errors import ArrowheadError, InputsInvalid, KernelUnavailable, NotIntercepted, UnsupportedPipeline
from arrowhead.evaluate import evaluate
from arrowhead.layout import Grid, Site, Tokens
from arrowhead.methods import Arrow, Attend, Full, Reuse
from arrowhead.plan import Plan
