#pragma once
#include "cpu/groups.h"
