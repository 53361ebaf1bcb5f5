#include "job_bodies.h"

SCOREMATCH_INSTANTIATE(16)
