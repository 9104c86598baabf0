-- Spends from one subject's budget atomically: spend() of window.py, in the same whole numbers.
--
-- KEYS[1]: the subject. One string holds both buckets, so that they share a slot of a cluster and one time to live.
-- ARGV: cost, limit. The clock is this server's.
-- Returns now in milliseconds, minute, current, previous, and 1 if the request is admitted or 0 if it is refused.
local MINUTE = 60000
local limit = tonumber(ARGV[2])
local cost = math.min(tonumber(ARGV[1]), math.max(limit, 1))

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local minute, current, previous = math.floor(now / MINUTE), 0, 0

local kept = redis.call('GET', KEYS[1])
if kept then
  local m, c, p = string.match(kept, '^(%d+) (%d+) (%d+)$')
  local age = minute - m
  if age == 0 or age == -1 then
    minute, current, previous = tonumber(m), tonumber(c), tonumber(p)
  elseif age == 1 then
    previous = tonumber(c)
  end
end

local elapsed = math.max(0, now - minute * MINUTE)
local used = current * MINUTE + previous * (MINUTE - elapsed)
if cost > 0 and used + cost * MINUTE > limit * MINUTE then
  return {now, minute, current, previous, 0}
end
if cost > 0 then
  current = current + cost
  redis.call('SET', KEYS[1], minute .. ' ' .. current .. ' ' .. previous, 'EX', 120)
end
return {now, minute, current, previous, 1}
