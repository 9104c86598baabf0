-- Spends from the budgets of several subjects atomically: spend() of window.py, in the same whole numbers.
--
-- KEYS: the subjects. One string holds both buckets of each, so that they have one time to live.
-- ARGV: cost, limit of each. The clock is this server's.
-- Returns now in milliseconds, 1 if the call is admitted or 0 if it is refused, and minute, current, previous of each.
local MINUTE = 60000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local this_minute = math.floor(now / MINUTE)

local kept = redis.call('MGET', unpack(KEYS))
local answer, costs, admitted = {now, 1}, {}, true
for i = 1, #KEYS do
  local limit = tonumber(ARGV[2 * i])
  local cost = math.min(tonumber(ARGV[2 * i - 1]), math.max(limit, 1))
  local minute, current, previous = this_minute, 0, 0
  if kept[i] then
    local m, c, p = string.match(kept[i], '^(%d+) (%d+) (%d+)$')
    local age = m and this_minute - m
    if age == 0 or age == -1 then
      minute, current, previous = tonumber(m), tonumber(c), tonumber(p)
    elseif age == 1 then
      previous = tonumber(c)
    end
  end
  local elapsed = math.max(0, now - minute * MINUTE)
  local used = current * MINUTE + previous * (MINUTE - elapsed)
  if cost > 0 and used + cost * MINUTE > limit * MINUTE then
    admitted = false
  end
  costs[i] = cost
  answer[3 * i], answer[3 * i + 1], answer[3 * i + 2] = minute, current, previous
end

if not admitted then
  answer[2] = 0
  return answer
end
for i = 1, #KEYS do
  if costs[i] > 0 then
    local current = answer[3 * i + 1] + costs[i]
    answer[3 * i + 1] = current
    redis.call('SET', KEYS[i], answer[3 * i] .. ' ' .. current .. ' ' .. answer[3 * i + 2], 'EX', 120)
  end
end
return answer
