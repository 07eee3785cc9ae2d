"""Class tables, synonyms, Mandarin names, prompt templates and seen/unseen splits: the text that users edit.

In: names of vocabularies and splits, a user's prompt string, JSON or text files of names.
Out: `Vocabulary` records, lists of prompt strings for the text tower, tuples of class indices.

    from vocab import COCO_PANOPTIC, prompts, split
    texts = prompts(COCO_PANOPTIC, languages=("en", "zh"))  # per class, per synonym, a list of strings
    seen, unseen = split(COCO_PANOPTIC, "ovp_val")          # class indices, 96 and 37 of them

`python vocab.py [NAME]` prints the tables.
"""
# SPDX-License-Identifier: MIT
import argparse
import difflib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path


# ---------------------------------------------------------------- the record
@dataclass(frozen=True)
class Vocabulary:
    """K classes; row order is the class index 0..K-1.

    `names` are the data set's own spelling ("tree-merged"), `ids` its category ids, `thing` thing or stuff.
    `synonyms[k]` are the words for the text tower ("tree", "bush", ..., Mandarin ones last), the one to show
    first; when left out, the cleaned name. Lists become tuples, so that dataclasses.asdict, JSON and
    `Vocabulary(**row)` give an equal record back.
    """
    name: str
    names: tuple[str, ...]
    ids: tuple[int, ...]
    thing: tuple[bool, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        synonyms = self.synonyms or [(clean(name),) for name in self.names]
        columns = {"names": tuple(self.names), "ids": tuple(self.ids), "thing": tuple(self.thing),
                   "synonyms": tuple(tuple(words) for words in synonyms)}
        for field, column in columns.items():
            object.__setattr__(self, field, column)
        lengths = [len(column) for column in columns.values()]
        assert len(set(lengths)) == 1, f"{self.name}: names, ids, thing, synonyms have lengths {lengths}"


def clean(name):
    """Makes a prompt word of a class name: "wall-other-merged" -> "wall", "road, route" -> "road"."""
    word = re.sub(r"(-(other|merged|stuff))+$", "", name.split(",")[0].strip().lower())
    # The towers delete punctuation, which would glue "t-shirt" into "tshirt".
    return re.sub(r"[-_\s]+", " ", word).strip()


def is_mandarin(word):
    """True if the word holds a Chinese character."""
    return any("\u4e00" <= c <= "\u9fff" for c in word)


def _table(name, text):
    """Reads rows `<id> <thing|stuff> <name> | <Mandarin>, ... | <word>, ...`; no words: the cleaned name."""
    rows = []
    for line in text.strip().splitlines():
        head, mandarin, english = [*(part.strip() for part in line.split("|")), "", ""][:3]
        number, kind, class_name = head.split(" ", 2)
        assert kind in ("thing", "stuff") and line.count("|") < 3, f"{name}: bad row {line!r}"
        words = f"{english or clean(class_name)},{mandarin}".split(",")
        rows.append((class_name, int(number), kind == "thing", [w.strip() for w in words if w.strip()]))
    return Vocabulary(name, *zip(*rows, strict=True))


# ---------------------------------------------------------------- tables
# Columns: data-set id, thing or stuff, data-set name | Mandarin | prompt word to show, then its synonyms.
# A synonym may not belong to another class of the same table: a class's score is the max over its words.

# panopticapi's panoptic_coco_categories.json, in its order; words were chosen on COCO.
COCO_PANOPTIC = _table("coco_panoptic", """
1 thing person | 人 | person, people, man, woman, child, boy, girl
2 thing bicycle | 自行车 | bicycle, bike
3 thing car | 汽车, 轿车 | car, automobile, sedan, van
4 thing motorcycle | 摩托车 | motorcycle, motorbike, motor scooter
5 thing airplane | 飞机 | airplane, aeroplane, plane, jet
6 thing bus | 公共汽车, 公交车, 巴士 | bus, minibus, double decker bus
7 thing train | 火车, 列车 | train, locomotive, subway train
8 thing truck | 卡车, 货车 | truck, lorry, pickup truck
9 thing boat | 船, 小船 | boat, ship, sailboat, canoe
10 thing traffic light | 交通灯, 红绿灯 | traffic light, traffic signal, stoplight
11 thing fire hydrant | 消防栓 | fire hydrant, hydrant
13 thing stop sign | 停车让行标志, 停车标志 | stop sign
14 thing parking meter | 停车计时器, 停车收费表
15 thing bench | 长椅, 长凳 | bench, park bench
16 thing bird | 鸟 | bird, pigeon, seagull, duck, goose
17 thing cat | 猫 | cat, kitten
18 thing dog | 狗 | dog, puppy
19 thing horse | 马 | horse, pony
20 thing sheep | 绵羊, 羊 | sheep, lamb
21 thing cow | 牛, 奶牛 | cow, cattle, bull, ox
22 thing elephant | 大象
23 thing bear | 熊 | bear, polar bear, brown bear
24 thing zebra | 斑马
25 thing giraffe | 长颈鹿
27 thing backpack | 背包, 双肩包 | backpack, rucksack, knapsack
28 thing umbrella | 雨伞, 伞 | umbrella, parasol
31 thing handbag | 手提包 | handbag, purse, tote bag
32 thing tie | 领带 | tie, necktie, bow tie
33 thing suitcase | 行李箱, 手提箱 | suitcase, luggage
34 thing frisbee | 飞盘 | frisbee, flying disc
35 thing skis | 滑雪板 | skis, pair of skis
36 thing snowboard | 单板滑雪板, 滑雪单板
37 thing sports ball | 球, 运动球 | sports ball, ball, soccer ball, basketball, tennis ball
38 thing kite | 风筝
39 thing baseball bat | 棒球棒, 棒球棍
40 thing baseball glove | 棒球手套 | baseball glove, baseball mitt
41 thing skateboard | 滑板
42 thing surfboard | 冲浪板
43 thing tennis racket | 网球拍 | tennis racket, tennis racquet
44 thing bottle | 瓶子 | bottle, water bottle, wine bottle
46 thing wine glass | 酒杯, 高脚杯 | wine glass, wineglass, goblet
47 thing cup | 杯子 | cup, mug, coffee cup, teacup
48 thing fork | 叉子, 餐叉
49 thing knife | 刀, 刀子
50 thing spoon | 勺子, 汤匙
51 thing bowl | 碗
52 thing banana | 香蕉
53 thing apple | 苹果
54 thing sandwich | 三明治 | sandwich, hamburger, burger
55 thing orange | 橙子, 橘子 | orange, tangerine, mandarin orange
56 thing broccoli | 西兰花
57 thing carrot | 胡萝卜
58 thing hot dog | 热狗 | hot dog, hotdog
59 thing pizza | 披萨, 比萨饼
60 thing donut | 甜甜圈 | donut, doughnut
61 thing cake | 蛋糕 | cake, cupcake, birthday cake
62 thing chair | 椅子 | chair, armchair, office chair
63 thing couch | 沙发 | couch, sofa, loveseat
64 thing potted plant | 盆栽, 盆栽植物 | potted plant, houseplant
65 thing bed | 床
67 thing dining table | 餐桌 | dining table, kitchen table
70 thing toilet | 马桶, 坐便器 | toilet, toilet bowl
72 thing tv | 电视, 电视机 | tv, television, television set, computer monitor
73 thing laptop | 笔记本电脑 | laptop, laptop computer, notebook computer
74 thing mouse | 鼠标 | mouse, computer mouse
75 thing remote | 遥控器 | remote, remote control
76 thing keyboard | 键盘 | keyboard, computer keyboard
77 thing cell phone | 手机, 移动电话 | cell phone, mobile phone, smartphone, cellphone
78 thing microwave | 微波炉 | microwave, microwave oven
79 thing oven | 烤箱 | oven, stove
80 thing toaster | 烤面包机, 吐司机
81 thing sink | 水槽, 洗手池 | sink, washbasin
82 thing refrigerator | 冰箱 | refrigerator, fridge, freezer
84 thing book | 书, 书本
85 thing clock | 时钟, 钟 | clock, wall clock, alarm clock
86 thing vase | 花瓶 | vase, flower vase
87 thing scissors | 剪刀 | scissors, pair of scissors
88 thing teddy bear | 泰迪熊, 毛绒玩具 | teddy bear, stuffed animal, plush toy
89 thing hair drier | 吹风机, 电吹风 | hair dryer, hair drier, blow dryer
90 thing toothbrush | 牙刷
92 stuff banner | 横幅 | banner, advertising banner
93 stuff blanket | 毯子, 毛毯 | blanket, quilt
95 stuff bridge | 桥, 桥梁 | bridge, footbridge
100 stuff cardboard | 纸板, 纸箱 | cardboard, cardboard box, carton
107 stuff counter | 台面, 柜台 | counter, countertop, kitchen counter
109 stuff curtain | 窗帘, 帘子 | curtain, drapes, shower curtain
112 stuff door-stuff | 门 | door
118 stuff floor-wood | 木地板 | wood floor, wooden floor, hardwood floor
119 stuff flower | 花, 花朵 | flower, blossom, bouquet
122 stuff fruit | 水果 | fruit, grapes, berries
125 stuff gravel | 砾石, 碎石 | gravel, pebbles
128 stuff house | 房子, 房屋 | house, cottage
130 stuff light | 灯, 灯具 | light, lamp, light fixture
133 stuff mirror-stuff | 镜子 | mirror
138 stuff net | 网 | net, netting, tennis net
141 stuff pillow | 枕头, 靠垫 | pillow, cushion
144 stuff platform | 站台, 平台 | platform, railway platform
145 stuff playingfield | 运动场, 球场 | playing field, sports field, baseball field, tennis court
147 stuff railroad | 铁路, 铁轨 | railroad, railway, train tracks
148 stuff river | 河流, 河 | river, stream
149 stuff road | 道路, 马路 | road, street, highway
151 stuff roof | 屋顶 | roof, rooftop
154 stuff sand | 沙子, 沙滩 | sand, sandy beach
155 stuff sea | 海, 大海 | sea, ocean
156 stuff shelf | 架子, 书架 | shelf, shelves, bookshelf, bookcase
159 stuff snow | 雪
161 stuff stairs | 楼梯, 台阶 | stairs, staircase, stairway, steps
166 stuff tent | 帐篷
168 stuff towel | 毛巾
171 stuff wall-brick | 砖墙 | brick wall
175 stuff wall-stone | 石墙 | stone wall
176 stuff wall-tile | 瓷砖墙 | tile wall, tiled wall
177 stuff wall-wood | 木墙 | wood wall, wooden wall
178 stuff water-other | 水, 水面 | water, pond, lake
180 stuff window-blind | 百叶窗 | window blind, blinds, window shutter
181 stuff window-other | 窗户, 窗子 | window, window pane
184 stuff tree-merged | 树, 树木 | tree, bush, branches, leaves
185 stuff fence-merged | 围栏, 栅栏 | fence, railing
186 stuff ceiling-merged | 天花板 | ceiling
187 stuff sky-other-merged | 天空 | sky, clouds
188 stuff cabinet-merged | 柜子, 橱柜 | cabinet, cupboard, wardrobe
189 stuff table-merged | 桌子, 书桌 | table, desk, coffee table
190 stuff floor-other-merged | 地板, 地砖 | floor, tile floor, tiled floor
191 stuff pavement-merged | 人行道, 铺装路面 | pavement, sidewalk, footpath
192 stuff mountain-merged | 山, 山脉 | mountain, hill
193 stuff grass-merged | 草, 草地 | grass, lawn, meadow
194 stuff dirt-merged | 泥土, 土地 | dirt, soil, mud, bare ground
195 stuff paper-merged | 纸, 纸张 | paper, sheet of paper, napkin
196 stuff food-other-merged | 食物, 食品 | food, meal, vegetables, salad
197 stuff building-other-merged | 建筑物, 大楼 | building, skyscraper, tower
198 stuff rock-merged | 岩石, 石头 | rock, stone, boulder
199 stuff wall-other-merged | 墙, 墙壁 | wall, concrete wall
200 stuff rug-merged | 地毯, 地垫 | rug, carpet, mat
""")

# The things of COCO, ids 1..90, are also its instance classes.
COCO_INSTANCE = Vocabulary("coco_instance", COCO_PANOPTIC.names[:80], COCO_PANOPTIC.ids[:80], (True,) * 80,
                           COCO_PANOPTIC.synonyms[:80])

# SceneParsing's objectInfo150.txt, ids 0..149 (its 1..150 less one), the 100 things of annotations_instance.
# Where the official lists give one word to two classes ("counter", "screen", "ground", ...), one keeps it.
ADE20K = _table("ade20k", """
0 stuff wall | 墙, 墙壁
1 stuff building | 建筑物, 大楼 | building, edifice
2 stuff sky | 天空
3 stuff floor | 地板 | floor, flooring
4 stuff tree | 树, 树木
5 stuff ceiling | 天花板
6 stuff road, route | 道路, 马路 | road, route, street
7 thing bed | 床
8 thing window | 窗户, 窗子 | window, window pane
9 stuff grass | 草, 草地 | grass, lawn
10 thing cabinet | 柜子, 橱柜 | cabinet, cupboard
11 stuff sidewalk, pavement | 人行道 | sidewalk, pavement
12 thing person | 人 | person, people, man, woman, child, boy, girl
13 stuff earth, ground | 地面, 泥地 | earth, ground, bare ground
14 thing door | 门 | door, double door
15 thing table | 桌子
16 stuff mountain, mount | 山, 山脉 | mountain, mount
17 stuff plant | 植物 | plant, potted plant, bush, shrub
18 thing curtain | 窗帘, 帘子 | curtain, drapes
19 thing chair | 椅子
20 thing car | 汽车, 轿车 | car, automobile
21 stuff water | 水, 水面
22 thing painting, picture | 画, 图画 | painting, picture, framed picture
23 thing sofa | 沙发 | sofa, couch
24 thing shelf | 架子, 搁板 | shelf, shelves
25 stuff house | 房子, 房屋
26 stuff sea | 海, 大海 | sea, ocean
27 thing mirror | 镜子
28 stuff rug | 地毯 | rug, carpet
29 stuff field | 田野, 田地 | field, farm field
30 thing armchair | 扶手椅
31 thing seat | 座位, 座椅
32 thing fence | 围栏, 栅栏 | fence, fencing
33 thing desk | 书桌, 办公桌
34 stuff rock, stone | 岩石, 石头 | rock, stone, boulder
35 thing wardrobe, closet, press | 衣柜, 衣橱 | wardrobe, closet
36 thing lamp | 台灯, 落地灯 | lamp, table lamp, floor lamp
37 thing tub | 浴缸 | bathtub, tub
38 thing rail | 栏杆 | railing, rail
39 thing cushion | 靠垫, 坐垫
40 stuff base, pedestal, stand | 底座, 基座 | pedestal, base, stand
41 thing box | 箱子, 盒子
42 thing column, pillar | 柱子, 圆柱 | column, pillar
43 thing signboard, sign | 招牌, 标志牌 | signboard, sign
44 thing chest of drawers, chest, bureau, dresser | 五斗柜, 抽屉柜 | chest of drawers, dresser, bureau
45 thing counter | 柜台
46 stuff sand | 沙子, 沙地
47 thing sink | 水槽, 洗手池 | sink, washbasin
48 stuff skyscraper | 摩天大楼, 摩天楼 | skyscraper, high rise building
49 thing fireplace | 壁炉
50 thing refrigerator, icebox | 冰箱 | refrigerator, fridge, icebox
51 stuff grandstand, covered stand | 看台 | grandstand, covered stand, bleachers
52 stuff path | 小路, 小径 | path, footpath, trail
53 thing stairs | 台阶 | stairs, flight of stairs
54 stuff runway | 跑道, 机场跑道 | runway, airport runway
55 thing case, display case, showcase, vitrine | 展示柜, 陈列柜 | display case, showcase, vitrine
56 thing pool table, billiard table, snooker table | 台球桌 | pool table, billiard table, snooker table
57 thing pillow | 枕头
58 thing screen door, screen | 纱门 | screen door
59 stuff stairway, staircase | 楼梯 | staircase, stairway
60 stuff river | 河流, 河
61 stuff bridge, span | 桥, 桥梁 | bridge
62 thing bookcase | 书柜, 书架 | bookcase, bookshelf
63 stuff blind, screen | 百叶窗 | window blind, blinds, venetian blind
64 thing coffee table | 茶几, 咖啡桌
65 thing toilet, can, commode, crapper, pot, potty, stool, throne | 马桶, 坐便器 | toilet, commode
66 thing flower | 花, 花朵
67 thing book | 书, 书本
68 stuff hill | 山丘, 小山
69 thing bench | 长椅, 长凳
70 thing countertop | 台面 | countertop, worktop
71 thing stove | 炉灶, 灶台 | stove, kitchen stove, cooktop
72 thing palm, palm tree | 棕榈树 | palm tree, palm
73 thing kitchen island | 厨房岛台, 中岛
74 thing computer | 电脑, 计算机 | computer, desktop computer
75 thing swivel chair | 转椅 | swivel chair, office chair
76 thing boat | 小船, 船 | boat, rowboat
77 stuff bar | 吧台, 酒吧 | bar, bar counter
78 thing arcade machine | 街机 | arcade machine, arcade game
79 stuff hovel, hut, hutch, shack, shanty | 棚屋, 小屋 | hut, shack, shanty, hovel
80 thing bus | 公共汽车, 公交车, 巴士
81 thing towel | 毛巾
82 thing light | 灯, 灯具 | light, light fixture
83 thing truck | 卡车, 货车 | truck, lorry
84 stuff tower | 塔, 塔楼
85 thing chandelier | 枝形吊灯, 吊灯
86 thing awning, sunshade, sunblind | 遮阳篷, 雨篷 | awning, sunshade, sunblind
87 thing street lamp | 路灯 | street lamp, street light
88 thing booth | 亭子, 售货亭 | booth, kiosk, stall
89 thing tv | 电视, 电视机 | tv, television
90 thing plane | 飞机 | airplane, plane, aeroplane
91 stuff dirt track | 土路 | dirt track, dirt road
92 thing clothes | 衣服, 衣物 | clothes, clothing, apparel
93 thing pole | 杆子, 杆
94 stuff land, ground, soil | 土地, 土壤 | land, soil
95 thing bannister, banister, balustrade, balusters, handrail | 扶手 | banister, balustrade, handrail
96 stuff escalator, moving staircase, moving stairway | 自动扶梯 | escalator, moving staircase
97 thing ottoman, pouf, pouffe, puff, hassock | 脚凳, 软垫凳 | ottoman, pouf, hassock
98 thing bottle | 瓶子
99 stuff buffet, counter, sideboard | 餐具柜, 餐边柜 | sideboard, buffet
100 stuff poster, posting, placard, notice, bill, card | 海报, 告示 | poster, placard, notice
101 stuff stage | 舞台
102 thing van | 面包车, 厢式货车 | van, minivan
103 thing ship | 轮船, 船舶
104 thing fountain | 喷泉
105 stuff conveyer belt, conveyor belt, conveyer, conveyor, transporter | 传送带 | conveyor belt, conveyor
106 stuff canopy | 顶篷, 华盖
107 thing washer, automatic washer, washing machine | 洗衣机 | washing machine, washer
108 thing plaything, toy | 玩具 | toy, plaything
109 stuff pool | 游泳池, 泳池 | swimming pool, pool
110 thing stool | 凳子 | stool, bar stool
111 thing barrel, cask | 木桶, 桶 | barrel, cask
112 thing basket, handbasket | 篮子 | basket, handbasket
113 stuff falls | 瀑布 | waterfall, falls
114 stuff tent | 帐篷
115 thing bag | 包, 袋子 | bag, handbag
116 thing minibike, motorbike | 摩托车 | motorbike, motorcycle, minibike
117 stuff cradle | 摇篮 | cradle, crib
118 thing oven | 烤箱
119 thing ball | 球
120 thing food, solid food | 食物, 食品 | food
121 thing step, stair | 梯级, 踏步 | step, single step
122 stuff tank, storage tank | 储罐, 水箱 | storage tank, tank
123 thing trade name | 商标, 品牌名 | trade name, brand name, logo
124 thing microwave | 微波炉 | microwave, microwave oven
125 thing pot | 锅, 花盆 | pot, cooking pot, flowerpot
126 thing animal | 动物 | animal, dog, cat, horse, cow, bird
127 thing bicycle | 自行车 | bicycle, bike
128 stuff lake | 湖, 湖泊
129 thing dishwasher | 洗碗机
130 thing screen | 屏幕, 银幕 | screen, projection screen
131 stuff blanket, cover | 毯子, 毛毯 | blanket
132 thing sculpture | 雕塑, 雕像 | sculpture, statue
133 thing hood, exhaust hood | 抽油烟机 | exhaust hood, range hood, hood
134 thing sconce | 壁灯 | sconce, wall lamp
135 thing vase | 花瓶
136 thing traffic light | 交通灯, 红绿灯 | traffic light, traffic signal
137 thing tray | 托盘
138 thing trash can | 垃圾桶, 垃圾箱 | trash can, garbage can, dustbin
139 thing fan | 风扇, 电扇 | fan, ceiling fan, electric fan
140 stuff pier | 码头 | pier, wharf, dock
141 stuff crt screen | 显像管屏幕
142 thing plate | 盘子, 碟子 | plate, dish
143 thing monitor | 显示器, 监视器 | monitor, computer monitor
144 thing bulletin board | 公告板, 布告栏 | bulletin board, notice board
145 stuff shower | 淋浴间, 淋浴
146 thing radiator | 暖气片, 散热器
147 thing glass, drinking glass | 玻璃杯 | drinking glass, glass
148 thing clock | 时钟, 钟
149 thing flag | 旗帜, 旗子
""")

# Its things are also its instance classes, in the order of annotations_instance's R = 1..100.
_AT = [k for k, thing in enumerate(ADE20K.thing) if thing]
ADE20K_INSTANCE = Vocabulary("ade20k_instance", *([column[k] for k in _AT] for column in (
    ADE20K.names, ADE20K.ids, ADE20K.thing, ADE20K.synonyms)))

# cityscapesScripts' labels with a train id: ids are labelIds, rows are in train-id order.
CITYSCAPES = _table("cityscapes", """
7 stuff road | 道路, 马路 | road, street
8 stuff sidewalk | 人行道 | sidewalk, pavement
11 stuff building | 建筑物, 大楼 | building, house
12 stuff wall | 墙, 墙壁 | wall, brick wall, stone wall
13 stuff fence | 围栏, 栅栏 | fence, railing
17 stuff pole | 杆子, 灯杆 | pole, lamp post, utility pole
19 stuff traffic light | 交通灯, 红绿灯 | traffic light, traffic signal
20 stuff traffic sign | 交通标志, 路标 | traffic sign, road sign, street sign
21 stuff vegetation | 植被, 树木 | vegetation, tree, bush, hedge
22 stuff terrain | 地形, 草地 | terrain, grass, soil, dirt
23 stuff sky | 天空
24 thing person | 人, 行人 | person, pedestrian, people, man, woman, child
25 thing rider | 骑车人, 骑手 | rider, cyclist, motorcyclist
26 thing car | 汽车, 轿车 | car, automobile
27 thing truck | 卡车, 货车 | truck, lorry
28 thing bus | 公共汽车, 公交车, 巴士
31 thing train | 火车, 有轨电车 | train, tram
32 thing motorcycle | 摩托车 | motorcycle, motorbike, motor scooter
33 thing bicycle | 自行车 | bicycle, bike
""")

# The procedural worlds that data.py draws: a closed one, where the hue tells the class, and all combinations.
SHAPES = _table("shapes", """
1 thing red disc
2 thing green ring
3 thing blue bar
4 thing yellow pole
5 thing white cross
6 stuff gray stripes
7 stuff brown dots
8 stuff teal bricks
""")
_THINGS = [f"{c} {s}" for c in ("red", "green", "blue", "yellow", "white")
           for s in ("disc", "ring", "bar", "pole", "cross")]
_STUFF = [f"{c} {p}" for c in ("gray", "brown", "teal") for p in ("stripes", "dots", "bricks")]
SHAPES_OPEN = Vocabulary("shapes_open", _THINGS + _STUFF, range(1, 35), [True] * 25 + [False] * 9)

VOCABULARIES = {v.name: v for v in (COCO_PANOPTIC, COCO_INSTANCE, ADE20K, ADE20K_INSTANCE, CITYSCAPES, SHAPES,
                                   SHAPES_OPEN)}


def _words(mandarin):
    """{vocabulary name: {class name: its words of one language}}."""
    return {vocab.name: {name: tuple(word for word in words if is_mandarin(word) == mandarin)
                         for name, words in zip(vocab.names, vocab.synonyms, strict=True)}
            for vocab in VOCABULARIES.values()}


SYNONYMS = _words(mandarin=False)  # SYNONYMS["coco_panoptic"]["couch"] == ("couch", "sofa", "loveseat")
MANDARIN = _words(mandarin=True)

# ---------------------------------------------------------------- prompts
_SIZED = ("a photo of a {}", "this is a photo of a {}", "there is a {} in the scene")
_VILD14 = _SIZED + ("there is the {} in the scene", "a photo of a {} in the scene") + tuple(
    template.format(f"{size} {{}}") for template in _SIZED for size in ("small", "medium", "large"))
TEMPLATES = {  # English, for things
    "default": ("a photo of a {}.", "a {} in the scene."),
    "plain": ("a {}",),  # the captions of the procedural world
    "vild14": _VILD14,  # ViLD's 14, less case and full stops, which the towers drop anyway
}
STUFF_TEMPLATES = {
    "default": ("a patch of {}", "the {} background"),
    "plain": ("{}",),
    "vild14": _VILD14,
}
MANDARIN_TEMPLATES = ("一张{}的照片。", "场景中的{}。")
MANDARIN_STUFF_TEMPLATES = ("一片{}", "{}背景")
LANGUAGES = ("en", "zh")


def prompts(vocab, languages=("en",), templates="default"):
    """Returns the texts to embed: a list over the K classes of lists over synonyms of lists of strings.

    The strings of one synonym are its filled-in templates (average their embeddings to one row); a class's
    score is the max over its synonyms. A class without a word in `languages` keeps all its words; for prompts
    that a user typed pass LANGUAGES. Mandarin words use the Mandarin templates whatever `templates` says.
    ValueError: unknown language or templates.
    """
    for language in languages:
        if language not in LANGUAGES:
            raise ValueError(f"languages!{language}: unknown language; use {' or '.join(LANGUAGES)}")
    if templates not in TEMPLATES:
        raise ValueError(f"templates!{templates}: unknown templates; use one of {', '.join(TEMPLATES)}")
    out = []
    for thing, words in zip(vocab.thing, vocab.synonyms, strict=True):
        english = (TEMPLATES if thing else STUFF_TEMPLATES)[templates]
        mandarin = MANDARIN_TEMPLATES if thing else MANDARIN_STUFF_TEMPLATES
        kept = [word for word in words if ("zh" if is_mandarin(word) else "en") in languages] or words
        out.append([[t.format(word) for t in (mandarin if is_mandarin(word) else english)] for word in kept])
    return out


def captions(vocab):
    """Returns what may be said of a picture, full prompts and bare words (n), and which of it is true where a
    class is seen, bools K x n."""
    texts = [words[0][0] for words in prompts(vocab, templates="plain")]
    words = list(dict.fromkeys(word for name in vocab.names for word in name.split()))
    return texts + words, [[k == j for j in range(len(texts))] + [word in name.split() for word in words]
                           for k, name in enumerate(vocab.names)]


def parse_prompts(text, source="prompts"):
    """Reads "cat, zebra|zebras; stuff: road, sky" into a Vocabulary with ids 1..K in the order typed.

    Comma = next class, `|` = synonyms of one class (the first names it), `;` = next section. A section that
    starts with `stuff:` holds stuff, with `things:` or nothing things. Full-width and Mandarin punctuation is
    read as its ASCII counterpart. ValueError `<source>!<word>: ...`: empty or repeated prompt, bad section.
    """
    # NFKC maps the full-width comma, colon, semicolon and bar to ASCII, but not the enumeration comma.
    text = unicodedata.normalize("NFKC", text).replace("\u3001", ",")
    rows, used = [], set()
    for section in text.split(";"):
        kind, colon, listed = section.rpartition(":")
        kind = kind.strip().lower()
        if colon and kind not in ("thing", "things", "stuff"):
            raise ValueError(f"{source}!{kind or ':'}: unknown section; write things: or stuff:")
        for prompt in listed.split(","):
            typed = [" ".join(word.split()) for word in prompt.split("|")]
            words = [clean(word) for word in typed]  # "t-shirt" is shown, "t shirt" embedded
            for word, shown in zip(words, typed, strict=True):
                if not word:
                    raise ValueError(f"{source}!{section.strip()}: empty prompt; remove the spare , | ; or :")
                if shown.lower() in used:
                    raise ValueError(f"{source}!{shown}: named twice; write it once, synonyms joined with |")
                used.add(shown.lower())
            rows.append((typed[0], len(rows) + 1, kind != "stuff", list(dict.fromkeys(words))))
    return Vocabulary(source, *zip(*rows, strict=True))


def _check_text(text, source):
    """ValueError for what another encoding leaves in a text decoded as UTF-8 with errors="replace"."""
    if "\ufffd" in text or "\0" in text:
        raise ValueError(f"{source}: not UTF-8; save it as UTF-8")


def parse_classes(text, source="classes.txt"):
    """Reads a list of classes, one a line, into a Vocabulary of stuff; the first line has the id 0.

    ValueError: a blank line, a name twice, no name, more than 254, or U+FFFD or NUL (not UTF-8).
    """
    _check_text(text, source)
    names = [line.strip() for line in text.rstrip().splitlines()]
    if not 0 < len(names) < 255:
        raise ValueError(f"{source}: {len(names)} names; give 1 to 254, one a line")
    for n, name in enumerate(names):
        if not name or name in names[:n]:
            fault = "a name again" if name else "blank"
            raise ValueError(f"{source}: line {n + 1} is {fault}; the first line names value 0")
    return Vocabulary("own", names, range(len(names)), [False] * len(names))


# ---------------------------------------------------------------- seen and unseen classes
_COCO = ("coco_panoptic", "coco_instance")
# Name: the vocabularies it is made for, the unseen classes, the classes that are neither seen nor unseen.
SPLITS = {
    # 20 things and 17 stuff of COCO panoptic
    "ovp_val": (_COCO, """
        airplane, bus, cat, dog, cow, elephant, giraffe, umbrella, tie, suitcase, frisbee, snowboard,
        skateboard, cup, knife, cake, couch, keyboard, sink, scissors,
        banner, blanket, bridge, cardboard, counter, curtain, light, mirror-stuff, platform, playingfield,
        river, road, tree-merged, fence-merged, sky-other-merged, pavement-merged, grass-merged""", ""),
    # 119 seen and 14 unseen classes of zero-shot panoptic segmentation (PADing)
    "padding_119_14": (_COCO, """
        cow, giraffe, suitcase, frisbee, skateboard, carrot, scissors, cardboard, playingfield, river, road,
        tree-merged, sky-other-merged, grass-merged""", ""),
    # 48 seen and 17 unseen things (zero-shot detection, later ZSI, PADing); the other 15 are in neither list
    "ovcoco_48_17": (_COCO, """
        airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, cake, couch,
        keyboard, sink, scissors""", """
        traffic light, fire hydrant, stop sign, parking meter, sports ball, baseball bat, baseball glove,
        tennis racket, wine glass, hot dog, potted plant, dining table, cell phone, teddy bear,
        hair drier"""),
    # the procedural world: every colour and every shape is seen, these combinations are not
    "shapes": (("shapes_open",), """
        red ring, green disc, blue cross, yellow bar, white pole, blue disc, brown dots, teal stripes""", ""),
}


def split(vocab, name):
    """Returns (seen, unseen): two sorted tuples of class indices of `vocab` that share none.

    `name` is one of SPLITS or the path of a JSON file: a list of unseen class names, or {"unseen": [...],
    "seen": [...]} ("seen" left out: all others). Names match the data set's spelling or a synonym, any case.
    Classes may be in neither tuple: do not train on them and leave them out of the numbers. Of the built-in
    splits only ovcoco_48_17 has such: its sources pass over 15 of COCO's 80 things. They say nothing of
    stuff, all 53 on COCO_PANOPTIC count as seen. On COCO_INSTANCE a panoptic split keeps its things.
    ValueError `<file>!<name>: ...`: unknown split or class, a split of another vocabulary, an empty side.
    Without a name all classes are seen.
    """
    if not name:
        return tuple(range(len(vocab.names))), ()
    if name in SPLITS:
        made_for, unseen, neither = SPLITS[name]
        if vocab.name not in made_for:
            raise ValueError(f"{name}!{vocab.name}: made for {', '.join(made_for)}; use a JSON file of names")
        unseen, neither = (_indices(vocab, names) for names in (unseen, neither))
    else:
        unseen, neither = _read_split(vocab, Path(name))
    seen = tuple(k for k in range(len(vocab.names)) if k not in unseen | neither)
    if not seen or not unseen:
        side = "unseen" if seen else "seen"
        raise ValueError(f"{name}!{vocab.name}: no {side} class is left; leave at least one on each side")
    return seen, tuple(sorted(unseen))


def _indices(vocab, names):
    """The set of class indices of a built-in list; stuff is absent from an instance vocabulary."""
    listed = {name.strip() for name in names.split(",")}
    return {k for k, name in enumerate(vocab.names) if name in listed}


def _read_split(vocab, path):
    """Reads a JSON split; returns the sets of unseen class indices and of those in neither list."""
    if not path.is_file():
        near = difflib.get_close_matches(str(path), SPLITS, 1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(SPLITS)} or a JSON file of names"
        raise ValueError(f"{path}: no such split and no such file; {hint}")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); write a list of the unseen class names") from None
    lists = data if isinstance(data, dict) else {"unseen": data}
    good = set(lists) in ({"unseen"}, {"unseen", "seen"}) and all(isinstance(v, list) for v in lists.values())
    if not good or not all(isinstance(word, str) for words in lists.values() for word in words):
        raise ValueError(f"{path}: not a split; write [names] or {{\"unseen\": [names], \"seen\": [names]}}")
    unseen, seen = ({_find(vocab, word, path) for word in lists.get(key, ())} for key in ("unseen", "seen"))
    if unseen & seen:
        raise ValueError(f"{path}!{vocab.names[min(unseen & seen)]}: both seen and unseen; name it once")
    return unseen, (set(range(len(vocab.names))) - unseen - seen if "seen" in lists else set())


def _find(vocab, word, source):
    """The class index that `word` names: the data set's own spelling first, then any synonym."""
    known = {synonym.lower(): k for k, words in enumerate(vocab.synonyms) for synonym in words}
    known |= {name.lower(): k for k, name in enumerate(vocab.names)}
    wanted = word.strip().lower()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"`python vocab.py {vocab.name}` lists the names"
        raise ValueError(f"{source}!{word}: unknown class of {vocab.name}; {hint}")
    return known[wanted]


# ---------------------------------------------------------------- words in common
_PLURALS = {"men": "man", "children": "child", "mice": "mouse", "geese": "goose", "oxen": "ox"}  # women too


def _key(word):
    """A word's form for comparing: lower case, one space, an end that plurals share ("va" of vase, vases)."""
    word = " ".join(re.sub(r"[-_]", " ", word.lower()).split())
    for plural, singular in _PLURALS.items():
        word = re.sub(f"{plural}$", singular, word)
    word = re.sub(r"(?<=[su]s|[cs]h)es?$|(?<=x)es?$|(?<![su])s(es?)?$", "", word)
    return re.sub(r"[vf]e$", "f", re.sub(r"ie$", "y", word))


def overlap(trained, other, seen=None):
    """Returns (seen, unseen) class indices of `other`: seen = shares a word with a class of `trained`.

    `seen` limits `trained` to some class indices (those it was trained on). Plurals count as the same word.
    """
    indices = range(len(trained.names)) if seen is None else seen
    keys = {_key(word) for k in indices for word in trained.synonyms[k]}
    known = tuple(k for k, words in enumerate(other.synonyms) if any(_key(word) in keys for word in words))
    return known, tuple(k for k in range(len(other.names)) if k not in known)


def _kin(word, other):
    """True if two keys are the same or one is a kind of the other by its last word: "red car" and "car"."""
    gap = "" if is_mandarin(word) else " "  # Mandarin compounds have no space
    return word == other or word.endswith(gap + other) or other.endswith(gap + word)


def background(name, vocab):
    """Returns a Vocabulary of distractors for the prompts in `vocab`: masks won by one of them become void.

    `name`: coco, ade, none, or a text file in the syntax of parse_prompts, one section a line, `#` comments.
    A class that matches a prompt by any word is left out, also when one is a kind of the other: for "red car"
    the distractor "car" would win, for "wall" the distractor "brick wall" would.
    """
    if name == "none":
        words = Vocabulary("none", (), (), ())
    elif name in ("coco", "ade"):
        words = COCO_PANOPTIC if name == "coco" else ADE20K
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8-sig", errors="replace")
        _check_text(text, name)
        lines = (line.split("#")[0].strip() for line in text.splitlines())
        words = parse_prompts(";".join(line for line in lines if line), source=str(name))
    else:
        raise FileNotFoundError(f"{name}: no such file; background takes coco, ade, none or a text file")
    taken = [_key(word) for synonyms in vocab.synonyms for word in synonyms]
    kept = [k for k, synonyms in enumerate(words.synonyms)
            if not any(_kin(_key(word), prompt) for word in synonyms for prompt in taken)]
    columns = ([column[k] for k in kept] for column in (words.names, words.ids, words.thing, words.synonyms))
    return Vocabulary("background", *columns)


# ---------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser(description="Prints the class tables.")
    parser.add_argument("name", nargs="?", choices=VOCABULARIES, help="one vocabulary; default all")
    chosen = parser.parse_args().name
    for vocab in VOCABULARIES.values() if chosen is None else [VOCABULARIES[chosen]]:
        splits = [name for name, (made_for, *_) in SPLITS.items() if vocab.name in made_for]
        counts = f"{len(vocab.names)} classes, {sum(vocab.thing)} things"
        print(f"{vocab.name}: {counts}; splits: {', '.join(splits) or 'none'}")
        for k, words in enumerate(vocab.synonyms):
            kind = "thing" if vocab.thing[k] else "stuff"
            print(f"{k:4d} {vocab.ids[k]:4d} {kind} {vocab.names[k]} | {', '.join(words)}")


if __name__ == "__main__":
    main()
