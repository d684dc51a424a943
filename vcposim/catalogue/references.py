"""Whom every formula of this project comes from, as data.

A result is only as good as the source it can be checked against. Each source below was looked up: titles and author
lists are copied from the paper's own page, its authors' repository or an edited reference list, never recalled. The
catalogue names its sources by their keys, and `bibtex` turns keys into a bibliography:

>>> short("vcpo")
'Huang et al. 2026, arXiv:2602.17616'
>>> print(bibtex(["weaver_tao"]))
@misc{weaver_tao,
  title = {{The Optimal Reward Baseline for Gradient-Based Reinforcement Learning}},
  author = {Lex Weaver and Nigel Tao},
  year = {2001},
  howpublished = {UAI, 538-545},
  eprint = {1301.2315},
  archiveprefix = {arXiv},
  url = {https://arxiv.org/abs/1301.2315},
}
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vcposim.errors import unknown_name


@dataclass(frozen=True)
class Reference:
    """One source. A name in braces is an organization; a surname of several words is stored as "Surname, Given"."""

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    id: str
    """ "arXiv:...", "doi:...", an https address, or the place in print (volume and pages, report number, ISBN) """
    venue: str
    """where it was published; "preprint" and "blog" when nowhere else that could be confirmed"""

    def bibtex(self) -> str:
        """One `@misc` entry; the title in double braces keeps its capitals, an organization in them is one name."""
        authors = ("{" + escape(x.strip("{}")) + "}" if x.startswith("{") else escape(x) for x in self.authors)
        fields = {
            "title": "{" + escape(self.title) + "}",
            "author": " and ".join(authors),
            "year": str(self.year),
            "howpublished": escape(self.venue),
        }
        scheme, _, number = self.id.partition(":")
        if scheme == "arXiv":
            fields |= {"eprint": number, "archiveprefix": "arXiv", "url": f"https://arxiv.org/abs/{number}"}
        elif scheme == "doi":
            fields |= {"doi": number, "url": f"https://doi.org/{number}"}
        elif scheme == "https":
            fields["url"] = self.id
        else:
            fields["note"] = escape(self.id)
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}}}"


_TABLE = """
a3po | 2025 | arXiv:2512.06547 | preprint
  A-3PO: Accelerating Asynchronous LLM Training with Staleness-aware Proximal Policy Approximation
  Xiaocan Li; Shiliang Wu; Zheng Shen

adam_scaling | 2022 | arXiv:2205.10287 | NeurIPS 2022
  On the SDEs and Scaling Rules for Adaptive Gradient Algorithms
  Sadhika Malladi; Kaifeng Lyu; Abhishek Panigrahi; Sanjeev Arora

aipo | 2025 | arXiv:2505.24034 | preprint
  LlamaRL: A Distributed Asynchronous Reinforcement Learning Framework for Efficient Large-scale LLM Training
  Bo Wu; Sid Wang; Yunhao Tang; Jia Ding; Eryk Helenowski; Liang Tan; Tengyu Xu; Tushar Gowda; Zhengxing Chen; Chen Zhu;
  Xiaocheng Tang; Yundi Qian; Beibei Zhu; Rui Hou

areal | 2025 | arXiv:2505.24298 | preprint
  AReaL: A Large-Scale Asynchronous Reinforcement Learning System for Language Reasoning
  Wei Fu; Jiaxuan Gao; Xujie Shen; Chen Zhu; Zhiyu Mei; Chuyi He; Shusheng Xu; Guo Wei; Jun Mei; Jiashu Wang; Tongkai
  Yang; Binhang Yuan; Yi Wu

asymre | 2025 | arXiv:2506.20520 | preprint
  Asymmetric REINFORCE for off-Policy Reinforcement Learning: Balancing positive and negative rewards
  Charles Arnal; Gaëtan Narozniak; Vivien Cabannes; Yunhao Tang; Julia Kempe; Remi Munos

bapo | 2025 | arXiv:2510.18927 | preprint
  BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with Adaptive Clipping
  Zhiheng Xi; Xin Guo; Yang Nan; Enyu Zhou; Junrui Shen; Wenxiang Chen; Jiaqi Liu; Jixuan Huang; Zhihao Zhang; Honglin
  Guo; Xun Deng; Zhikai Lei; Miao Zheng; Guoteng Wang; Shuo Zhang; Peng Sun; Rui Zheng; Hang Yan; Tao Gui; Qi Zhang;
  Xuanjing Huang

chatterjee_diaconis | 2018 | arXiv:1511.01437 | Annals of Applied Probability 28(2), 1099-1135
  The sample size required in importance sampling
  Sourav Chatterjee; Persi Diaconis

cispo | 2025 | arXiv:2506.13585 | preprint
  MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention
  {MiniMax}

cppo | 2026 | arXiv:2606.10968 | preprint
  Beyond Uniform Token-Level Trust Region in LLM Reinforcement Learning
  Renjie Mao; Xiangxin Zhou; Lvfang Tao; Yixin Ding; Yu Shi; Yongguang Lin; Yuheng Wu; Honglin Zhu; Qian Qiu; Wenxi Zhu

ctpo | 2026 | arXiv:2605.07331 | preprint
  Rethinking Importance Sampling in LLM Policy Optimization: A Cumulative Token Perspective
  Yuheng Zhang; Chenlu Ye; Shuowei Jin; Changlong Yu; Wei Xiong; Saurabh Sahu; Nan Jiang

dapo | 2025 | arXiv:2503.14476 | preprint
  DAPO: An Open-Source LLM Reinforcement Learning System at Scale
  Qiying Yu; Zheng Zhang; Ruofei Zhu; Yufeng Yuan; Xiaochen Zuo; Yu Yue; Tiantian Fan; Gaohong Liu; Lingjun Liu; Xin
  Liu; Haibin Lin; Zhiqi Lin; Bole Ma; Guangming Sheng; Yuxuan Tong; Chi Zhang; Mofan Zhang; Wang Zhang; Hang Zhu;
  Jinhua Zhu; Jiaze Chen; Jiangjie Chen; Chengyi Wang; Hongli Yu; Weinan Dai; Yuxuan Song; Xiangpeng Wei; Hao Zhou;
  Jingjing Liu; Wei-Ying Ma; Ya-Qin Zhang; Lin Yan; Mu Qiao; Yonghui Wu; Mingxuan Wang

decoupled_ppo | 2022 | arXiv:2110.00641 | NeurIPS 2022
  Batch size-invariance for policy optimization
  Jacob Hilton; Karl Cobbe; John Schulman

deepseek_v32 | 2025 | arXiv:2512.02556 | preprint
  DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models
  {DeepSeek-AI}

delta_l | 2025 | arXiv:2509.07558 | preprint
  Delta L Normalization: Rethink Loss Aggregation in RLVR
  Zhiyuan He; Xufang Luo; Yike Zhang; Yuqing Yang; Lili Qiu

dispo | 2026 | arXiv:2602.00983 | AISTATS 2026
  DISPO: Enhancing Training Efficiency and Stability in Reinforcement Learning for Large Language Model Mathematical
  Reasoning
  Batuhan K. Karaman; Aditya Rawal; Suhaila Shakiah; Mohammad Ghavamzadeh; Mingyi Hong; Arijit Biswas; Ruida Zhou

dppo | 2026 | arXiv:2602.04879 | preprint
  Rethinking the Trust Region in LLM Reinforcement Learning
  Penghui Qi; Xiangxin Zhou; Zichen Liu; Tianyu Pang; Chao Du; Min Lin; Wee Sun Lee

dr_grpo | 2025 | arXiv:2503.20783 | preprint
  Understanding R1-Zero-Like Training: A Critical Perspective
  Zichen Liu; Changyu Chen; Wenjun Li; Penghui Qi; Tianyu Pang; Chao Du; Wee Sun Lee; Min Lin

drpo | 2026 | arXiv:2606.09821 | preprint
  Rethinking the Divergence Regularization in LLM RL
  Jiarui Yao; Xiangxin Zhou; Penghui Qi; Wee Sun Lee; Liefeng Bo; Tianyu Pang

dual_clip | 2020 | arXiv:1912.09729 | AAAI 2020, 6672-6679
  Mastering Complex Control in MOBA Games with Deep Reinforcement Learning
  Deheng Ye; Zhao Liu; Mingfei Sun; Bei Shi; Peilin Zhao; Hao Wu; Hongsheng Yu; Shaojie Yang; Xipeng Wu; Qingwei Guo;
  Qiaobo Chen; Yinyuting Yin; Hao Zhang; Tengfei Shi; Liang Wang; Qiang Fu; Wei Yang; Lanxiao Huang

elvira | 2022 | arXiv:1809.04129 | International Statistical Review 90(3), 525-550
  Rethinking the effective sample size
  Víctor Elvira; Luca Martino; Christian P. Robert

gepo | 2025 | arXiv:2508.17850 | preprint
  Group Expectation Policy Optimization for Heterogeneous Reinforcement Learning
  Han Zhang; Ruibin Zheng; Zexuan Yi; Zhuo Zhang; Hanyang Peng; Hui Wang; Zike Yuan; Cai Ke; Shiwei Chen; Jiacheng Yang;
  Yangning Li; Xiang Li; Jiangyue Yan; Yaoqi Liu; Liwen Jing; Jiayin Qi; Ruifeng Xu; Binxing Fang; Yue Yu

gipo | 2026 | arXiv:2603.03955 | preprint
  GIPO: Gaussian Importance Sampling Policy Optimization
  Chengxuan Lu; Zhenquan Zhang; Shukuan Wang; Qunzhi Lin; Baigui Sun; Yang Liu

gmpo | 2025 | arXiv:2507.20673 | preprint
  Geometric-Mean Policy Optimization
  Yuzhong Zhao; Yue Liu; Junpeng Liu; Jingye Chen; Xun Wu; Yaru Hao; Tengchao Lv; Shaohan Huang; Lei Cui; Qixiang Ye;
  Fang Wan; Furu Wei

gradient_alignment | 2026 | arXiv:2603.01501 | preprint
  GAC: Stabilizing Asynchronous RL Training for LLMs via Gradient Alignment Control
  Haofeng Xu; Junwei Su; Yukun Tian; Lansong Diao; Zhengping Qian; Chuan Wu

greensmith | 2004 | https://jmlr.org/papers/v5/greensmith04a.html | Journal of Machine Learning Research 5, 1471-1530
  Variance Reduction Techniques for Gradient Estimates in Reinforcement Learning
  Evan Greensmith; Peter L. Bartlett; Jonathan Baxter

grpo | 2024 | arXiv:2402.03300 | preprint
  DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models
  Zhihong Shao; Peiyi Wang; Qihao Zhu; Runxin Xu; Junxiao Song; Xiao Bi; Haowei Zhang; Mingchuan Zhang; Y. K. Li; Y. Wu;
  Daya Guo

gspo | 2025 | arXiv:2507.18071 | preprint
  Group Sequence Policy Optimization
  Chujie Zheng; Shixuan Liu; Mingze Li; Xiong-Hui Chen; Bowen Yu; Chang Gao; Kai Dang; Yuqiong Liu; Rui Men; An Yang;
  Jingren Zhou; Junyang Lin

icepop | 2025 | arXiv:2510.18855 | preprint
  Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model
  {Ling Team}

impala | 2018 | arXiv:1802.01561 | ICML 2018
  IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures
  Lasse Espeholt; Hubert Soyer; Rémi Munos; Karen Simonyan; Volodymyr Mnih; Tom Ward; Yotam Doron; Vlad Firoiu; Tim
  Harley; Iain Dunning; Shane Legg; Koray Kavukcuoglu

ionides | 2008 | JCGS 17, 295-311 | Journal of Computational and Graphical Statistics
  Truncated importance sampling
  E. L. Ionides

kimi_k15 | 2025 | arXiv:2501.12599 | preprint
  Kimi k1.5: Scaling Reinforcement Learning with LLMs
  {Kimi Team}

kish | 1965 | ISBN 9780471109495 | John Wiley & Sons
  Survey Sampling
  Leslie Kish

kl_cov | 2025 | https://github.com/PRIME-RL/Entropy-Mechanism-of-RL | software, of arXiv 2505.22617
  Code of: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models
  {PRIME-RL}

kong | 1992 | Technical Report 348 | Department of Statistics, University of Chicago
  A note on importance sampling using standardized weights
  Augustine Kong

kpo | 2026 | arXiv:2602.10609 | preprint
  Online Causal Kalman Filtering for Stable and Effective Policy Optimization
  Shuo He; Lang Feng; Xin Cheng; Lei Feng; Bo An

length_signal | 2026 | arXiv:2602.01826 | preprint
  Beyond Precision: Training-Inference Mismatch is an Optimization Problem and Simple LR Scheduling Fixes It
  Yaxiang Zhang; Yingru Li; Jiacai Liu; Jiawei Xu; Ziniu Li; Qian Liu; Haoyuan Li

luspo | 2026 | arXiv:2602.05261 | preprint
  Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR
  Fanfan Liu; Youyang Yin; Peng Shi; Siqi Yang; Zhixiong Zeng; Haibo Qiu

m2po | 2026 | arXiv:2510.01161 | ICLR 2026
  Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?
  Haizhong Zheng; Jiawei Zhao; Beidi Chen

maxrl | 2026 | arXiv:2602.02710 | preprint
  Maximum Likelihood Reinforcement Learning
  Fahim Tajwar; Guanning Zeng; Yueer Zhou; Yuda Song; Daman Arora; Yiding Jiang; Jeff Schneider; Ruslan Salakhutdinov;
  Haiwen Feng; Andrea Zanette

mc_grpo | 2026 | arXiv:2601.22582 | preprint
  MC-GRPO: Median-Centered Group Relative Policy Optimization for Small-Rollout Reinforcement Learning
  Youngeun Kim

minpro | 2026 | arXiv:2601.22718 | preprint
  A Step Back: Prefix Importance Ratio Stabilizes Policy Optimization
  Shiye Lei; Zhihao Cheng; Dacheng Tao

mis | 2025 | https://richardli.xyz/rl-collapse | blog
  When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch
  Jiacai Liu; Yingru Li; Yuqian Fu; Jiawei Wang; Qian Liu; Yu Shen

opo | 2025 | arXiv:2505.23585 | preprint
  On-Policy RL with Optimal Reward Baseline
  Yaru Hao; Li Dong; Xun Wu; Shaohan Huang; Zewen Chi; Furu Wei

opob_contextual_bandit | 2024 | arXiv:2405.05736 | RecSys 2024
  Optimal Baseline Corrections for Off-Policy Contextual Bandits
  Shashank Gupta; Olivier Jeunen; Harrie Oosterhuis; de Rijke, Maarten

opob_pgpe | 2013 | arXiv:1301.3966 | preprint
  Efficient Sample Reuse in Policy Gradients with Parameter-based Exploration
  Tingting Zhao; Hirotaka Hachiya; Voot Tangkaratt; Jun Morimoto; Masashi Sugiyama

otb | 2026 | arXiv:2602.07078 | preprint
  The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL
  Yingru Li; Jiawei Xu; Ziniu Li; Jiacai Liu; Wei Liu; Yuxuan Tong; Longtao Zheng; Zhenghai Xue; Yaxiang Zhang; Tianle
  Cai; Ge Zhang; Qian Liu; Baoxiang Wang

owen | 2013 | https://artowen.su.domains/mc/ | book, published by the author
  Monte Carlo theory, methods and examples
  Art B. Owen

p3o | 2026 | arXiv:2605.12380 | preprint
  Trust the Batch, On- or Off-Policy: Adaptive Policy Optimization for RL Post-Training
  Rasool Fakoor; Murdock Aubry; Nicholas Stranges; Alexander J. Smola

ppo | 2017 | arXiv:1707.06347 | preprint
  Proximal Policy Optimization Algorithms
  John Schulman; Filip Wolski; Prafulla Dhariwal; Alec Radford; Oleg Klimov

prime_rl | 2026 | https://github.com/PrimeIntellect-ai/prime-rl | software
  prime-rl
  {Prime Intellect}

psis | 2024 | arXiv:1507.02646 | Journal of Machine Learning Research 25(72), 1-58
  Pareto Smoothed Importance Sampling
  Aki Vehtari; Daniel Simpson; Andrew Gelman; Yuling Yao; Jonah Gabry

reinforce | 1992 | doi:10.1007/BF00992696 | Machine Learning 8, 229-256
  Simple statistical gradient-following algorithms for connectionist reinforcement learning
  Ronald J. Williams

reinforce_plus_plus | 2025 | arXiv:2501.03262 | preprint
  REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization
  Jian Hu; Jason Klein Liu; Haotian Xu; Wei Shen

rloo | 2024 | arXiv:2402.14740 | preprint
  Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
  Arash Ahmadian; Chris Cremer; Matthias Gallé; Marzieh Fadaee; Julia Kreutzer; Olivier Pietquin; Ahmet Üstün; Sara
  Hooker

sapo | 2025 | arXiv:2511.20347 | preprint
  Soft Adaptive Policy Optimization
  Chang Gao; Chujie Zheng; Xiong-Hui Chen; Kai Dang; Shixuan Liu; Bowen Yu; An Yang; Shuai Bai; Jingren Zhou; Junyang
  Lin

score_centering | 2026 | arXiv:2609.20807 | preprint
  Score Centering Stabilizes Off-policy Reinforcement Learning
  Martin Marek; Max Ryabinin

shrinkage | 2025 | arXiv:2511.03710 | preprint
  Shrinking the Variance: Shrinkage Baselines for Reinforcement Learning with Verifiable Rewards
  Guanning Zeng; Zhaoyi Zhou; Daman Arora; Andrea Zanette

snr_adaptive | 2025 | arXiv:2511.23310 | preprint
  OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning
  Zixun Huang; Jiayi Sheng; Zeyu Zheng

staleness_aware | 2016 | arXiv:1511.05950 | IJCAI 2016, 2350-2356
  Staleness-aware Async-SGD for Distributed Deep Learning
  Wei Zhang; Suyog Gupta; Xiangru Lian; Ji Liu

staleness_law | 2026 | arXiv:2607.01083 | preprint
  Staleness-Learning Rate Scaling Laws for Asynchronous RLHF
  Jingwei Song; Haofeng Xu; Jie Xiao; Chengke Bao; Jingwei Shi; Pengbin Feng; Weixun Wang; Yuhang Han; Chuan Wu; Linfeng
  Zhang; Bill Shi

tba | 2025 | arXiv:2503.18929 | NeurIPS 2025
  Trajectory Balance with Asynchrony: Decoupling Exploration and Learning for Fast, Scalable LLM Post-Training
  Brian R. Bartoldson; Siddarth Venkatraman; James Diffenderfer; Moksh Jain; Tal Ben-Nun; Seanie Lee; Minsu Kim; Johan
  Obando-Ceron; Yoshua Bengio; Bhavya Kailkhura

tis | 2025 | https://fengyao.notion.site/off-policy-rl | blog
  Your Efficient RL Framework Secretly Brings You Off-Policy RL Training
  Feng Yao; Liyuan Liu; Dinghuai Zhang; Chengyu Dong; Jingbo Shang; Jianfeng Gao

topr | 2025 | arXiv:2503.14286 | preprint
  Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs
  Le Roux, Nicolas; Marc G. Bellemare; Jonathan Lebensold; Arnaud Bergeron; Joshua Greaves; Alex Fréchette; Carolyne
  Pelletier; Eric Thibodeau-Laufer; Sándor Toth; Sam Work

vaco | 2026 | arXiv:2603.01365 | preprint
  Align and Filter: Improving Performance in Asynchronous On-Policy RL
  Homayoun Honari; Roger Creus Castanyer; Michael Przystupa; Michael Noukhovitch; Pablo Samuel Castro; Glen Berseth

vcpo | 2026 | arXiv:2602.17616 | ICML 2026
  Stable Asynchrony: Variance-Controlled Off-Policy RL for LLMs
  Luke J. Huang; Zhuoyang Zhang; Qinghao Hu; Shang Yang; Song Han

vespo | 2026 | arXiv:2602.10693 | preprint
  VESPO: Variational Sequence-level Soft Policy Optimization for Off-Policy LLM Training
  Guobin Shen; Chenxiao Zhao; Xiang Cheng; Lei Huang; Xing Yu

weaver_tao | 2001 | arXiv:1301.2315 | UAI, 538-545
  The Optimal Reward Baseline for Gradient-Based Reinforcement Learning
  Lex Weaver; Nigel Tao
"""
# One paragraph a source, in the order of the keys: `key | year | id | venue`, then the title, then the authors.


def _read(paragraph: str) -> Reference:
    """The source that a paragraph of the table describes."""
    head, title, *authors = (line.strip() for line in paragraph.splitlines())
    key, year, identifier, venue = head.split(" | ")
    return Reference(key, title, tuple(" ".join(authors).split("; ")), int(year), identifier, venue)


_SOURCES = tuple(_read(paragraph) for paragraph in _TABLE.strip().split("\n\n"))

SOURCES: dict[str, Reference] = {source.key: source for source in _SOURCES}
"""key -> source, in the order of the keys"""

_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: "\\" + character for character in "&%$#_{}"},
    }
)


def escape(text: str) -> str:
    """The text with every character that is special to TeX made literal; accented letters stay as they are (UTF-8).

    >>> escape("John Wiley & Sons")
    'John Wiley \\\\& Sons'
    """
    return text.translate(_ESCAPES)


def reference(key: str) -> Reference:
    """The source of that key; `InputError` with the nearest key otherwise."""
    if key not in SOURCES:
        raise unknown_name("reference", key, SOURCES)
    return SOURCES[key]


def short(key: str) -> str:
    """The source in a few words: first author, year, identifier.

    Raises `InputError` for an unknown key.

    >>> short("kong")
    'Kong 1992, Technical Report 348'
    """
    source = reference(key)
    # the family name: all of an organization, what precedes a comma, otherwise the last word
    first, *others = (
        name.strip("{}") if name.startswith("{") else name.partition(",")[0] if "," in name else name.split()[-1]
        for name in source.authors
    )
    who = first if not others else f"{first} and {others[0]}" if len(others) == 1 else f"{first} et al."
    return f"{who} {source.year}, {source.id}"


def bibtex(keys: Iterable[str]) -> str:
    """BibTeX entries of the keys, in the given order, separated by an empty line; needs no package beyond `@misc`.

    Raises `InputError` for an unknown key.
    """
    return "\n\n".join(reference(key).bibtex() for key in keys)
