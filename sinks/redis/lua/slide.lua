-- Slides the window to the present: adds the buckets that have become current, subtracts those that have left.
--
-- KEYS: the window, its state; then the sorted sets of consecutive buckets, those of the window among them.
-- ARGV: start of the newest bucket that belongs in the window; start of the first bucket in KEYS; seconds of a
--       bucket; seconds from the window's oldest bucket to its newest; how many seconds to slide at most;
--       seconds to keep the window.
-- The state is the start of the newest bucket in the window. Without state or window, or after too long a time, the
-- window is built from its buckets. An error half way leaves no state, so the next slide builds.

local WINDOW, STATE = KEYS[1], KEYS[2]
local NEWEST, FIRST, STEP = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local SPAN, FURTHEST, KEEP = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]

local function start(i)
  return FIRST + (i - 3) * STEP
end

local function build()
  local from, to = 3 + (NEWEST - SPAN - FIRST) / STEP, 3 + (NEWEST - FIRST) / STEP
  redis.call('ZUNIONSTORE', WINDOW, to - from + 1, unpack(KEYS, from, to))
end

local function add(bucket, sign)
  local members = redis.call('ZRANGE', bucket, 0, -1, 'WITHSCORES')
  for i = 1, #members, 2 do
    redis.call('ZINCRBY', WINDOW, sign .. members[i + 1], members[i])
  end
end

local function slide(was)
  for i = 3, #KEYS do
    local at = start(i)
    local had = at <= was and at >= was - SPAN
    local has = at <= NEWEST and at >= NEWEST - SPAN
    if has and not had then
      add(KEYS[i], '')
    elseif had and not has then
      add(KEYS[i], '-')
    end
  end
  redis.call('ZREMRANGEBYSCORE', WINDOW, '-inf', 0)
end

local size = redis.call('ZCARD', WINDOW) -- an error if another program uses the key; building would overwrite it
local was = tonumber(redis.call('GET', STATE) or '')
if not was or size == 0 or math.abs(NEWEST - was) > FURTHEST then
  redis.call('DEL', STATE)
  build()
elseif was ~= NEWEST then
  redis.call('DEL', STATE)
  slide(was)
end
redis.call('EXPIRE', WINDOW, KEEP)
redis.call('SETEX', STATE, KEEP, NEWEST)
